"""Parses a checkpoint's index.json, and checks that it is consistent before anything is read with it.

The file is not trusted, and a disk may have damaged it. Therefore every type and every range is checked.
"""

import json
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from jitscale.checkpoints.weights import MOMENTS, is_average
from jitscale.errors import CheckpointError

MOST_BYTES = 2**30  # largest index.json; 4,096 ranks of JiT-G need 0.1 GB
_NUMBERS_OF_PROGRESS = ("step", "images", "optimizer_step", "bad_samples", "skipped_steps", "skipped_images")


@dataclass(frozen=True)
class Index:
    """The content of index.json: the fragments and where they are stored."""

    progress: dict[str, Any]
    sets: list[str]  # the optimizer's moments included
    files: dict[str, int]  # name -> bytes
    sha256: dict[str, str]  # hash of every file, by its name
    shapes: dict[str, tuple[int, ...]]  # key: parameter
    fragments: dict[str, list[tuple[int, int, int]]]  # key: parameter; values: number of the file, offset, elements


def parse_hashes(text: str) -> dict[str, str]:
    """File name -> sha256, from JSON. Raises a ValueError at any other text."""
    hashes = _parsed(text)
    if not all(re.fullmatch(r"[0-9a-f]{64}", value) for value in hashes.values() if isinstance(value, str)):
        raise ValueError("a sha256 that is not 64 hexadecimal digits")
    return {name: _checked(value, str, f"sha256 of {name}") for name, value in hashes.items()}


def parse_index(text: str, folder: Path, known_format: int) -> Index:
    """The content of the index.json in `folder`.

    Raises a CheckpointError if it has another format, a ValueError with the reason if anything else is wrong.
    """
    content = _parsed(text)
    found = _number(content.get("format"), "format")
    if found != known_format:
        what = f"{folder}: checkpoint format {found}, this version reads format {known_format}"
        raise CheckpointError(f"{what}; use the version of jitscale that wrote it")
    progress = _checked(content.get("progress"), dict, "progress")
    for name in _NUMBERS_OF_PROGRESS:
        _number(progress.get(name, 0), f"progress.{name}")
    if progress.get("data") is not None:
        for name, value in _checked(progress["data"], dict, "progress.data").items():
            if type(value) not in (int, str):
                raise ValueError(f"progress.data.{name} is {value!r}")
    if progress.get("class_names") is not None:
        for name in _checked(progress["class_names"], list, "progress.class_names"):
            _checked(name, str, "a class name")
    files = _checked(content.get("files"), dict, "files")
    for name, size in files.items():
        _number(size, f"the size of {name}")
    sha256 = parse_hashes(json.dumps(content.get("sha256")))
    if sha256.keys() != files.keys():
        raise ValueError("its hashes do not match its files")
    shapes, fragments = _parameters(_checked(content.get("parameters"), dict, "parameters"), list(files.values()))
    return Index(progress, _sets(content.get("sets")), files, sha256, shapes, fragments)


def strange_sets(sets: Sequence[str]) -> list[str]:
    """The names in `sets` that no run has: neither the model, nor an average, nor moments."""
    return [name for name in sets if name not in (*MOMENTS, "model") and not is_average(name)]


def plain_file(folder: Path, name: str) -> os.stat_result:
    """The status of the regular file `name` inside `folder`. Raises a ValueError at a path, a device or a link."""
    if name in (".", "..") or "/" in name or "\0" in name:
        raise ValueError(f"{name!r} is not a plain file name")
    try:
        status = os.lstat(folder / name)
    except FileNotFoundError as error:
        raise ValueError("is missing") from error
    if not stat.S_ISREG(status.st_mode):
        link = ": a link; if its target is sound, copy the folder with cp -rL" if stat.S_ISLNK(status.st_mode) else ""
        raise ValueError(f"is not a regular file inside the folder{link}")
    return status


def _parsed(text: str) -> dict[str, Any]:
    try:
        return _checked(json.loads(text), dict, "its content")
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error


def _sets(found: Any) -> list[str]:
    sets = [_checked(name, str, "a weight set") for name in _checked(found, list, "sets")]
    if wrong := strange_sets(sets):
        raise ValueError(f"{wrong[0]!r} is not a name of a weight set")
    if len(set(sets)) < len(sets) or set(sets) <= set(MOMENTS):
        raise ValueError(f"its weight sets are {', '.join(sets) or 'none'}")
    return sets


def _parameters(
    entries: dict[str, Any], sizes: Sequence[int]
) -> tuple[dict[str, tuple[int, ...]], dict[str, list[tuple[int, int, int]]]]:
    """Shapes and fragments. Raises a ValueError unless each element of a parameter is in exactly one fragment."""
    shapes, fragments, bytes_of_file = {}, {}, [0] * len(sizes)
    for name, found in entries.items():
        entry = _checked(found, dict, name)
        shape = [_number(side, f"the shape of {name}") for side in _checked(entry.get("shape"), list, name)]
        pieces = []
        for piece in _checked(entry.get("fragments"), list, name):
            if len(_checked(piece, list, name)) != 3:
                raise ValueError(f"{name} has a fragment {piece!r}")
            file, offset, length = (_number(value, f"a fragment of {name}") for value in piece)
            if file >= len(sizes):
                raise ValueError(f"{name} has a fragment in file {file} of {len(sizes)}")
            bytes_of_file[file] += 4 * length
            pieces.append((file, offset, length))
        filled = 0
        for _, offset, length in sorted(pieces, key=lambda piece: piece[1:]):
            if offset != filled:
                raise ValueError(
                    f"the fragments of {name} {'overlap' if offset < filled else 'have a gap'} at {filled}"
                )
            filled += length
        if filled != prod(shape):
            raise ValueError(f"the fragments hold {filled} of {prod(shape)} elements of {name}")
        shapes[name], fragments[name] = tuple(shape), pieces
    if any(held > size for held, size in zip(bytes_of_file, sizes, strict=True)):
        raise ValueError("its fragments are larger than its files")
    return shapes, fragments


def _checked(value: Any, kind: type, what: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{what} is not a {kind.__name__} ({str(value)[:40]})")
    return value


def _number(value: Any, what: str) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{what} is not a whole number from 0 on ({str(value)[:40]})")
    return value
