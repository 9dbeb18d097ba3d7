"""The plan of a packing job: its options, and the images that it packs. The first task makes it; all others read it.

DIR/packing.json                     the options of the command; it stays next to the manifest
DIR/.packing/plan.json, inputs.npz   the shards to write
"""

import json
import math
import os
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jitscale.data.background import WHITE, parse_background
from jitscale.data.images import CHANNELS, CODECS, MOST_PIXELS, RGB
from jitscale.data.manifest import MANIFEST
from jitscale.errors import DataError, data_error
from jitscale.files import atomic_write, sha256_of
from jitscale.preparation.finding import OnFound, find_sources
from jitscale.preparation.forms.search import FindOptions
from jitscale.preparation.packing import ORIGINAL
from jitscale.preparation.sources import SourceTable, is_address

PACKING_CODECS = (*CODECS, ORIGINAL)
FOLDER = ".packing"
DAMAGED_JSON = (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError)  # errors of reading it

_PLAN, _INPUTS = "plan.json", "inputs.npz"
_OPTIONS = "packing.json"
_FEW = 3  # values of an option in an error message


@dataclass(frozen=True)
class PackingOptions:
    """Options that determine the content of the shards."""

    input: list[str]
    codec: str  # one of PACKING_CODECS
    resolution: int  # pixels per side
    samples_per_shard: int
    seed: int  # seed of the order
    background: str = str(WHITE)  # background of transparent images, as `parse_background` reads it
    channels: int = RGB  # channels of the images that are stored
    finding: FindOptions = field(default_factory=FindOptions)  # facts about the input that the user gives

    def __post_init__(self) -> None:
        """Raises a DataError at an unknown codec or background, or a number out of its range."""
        parse_background(self.background)
        if self.codec not in PACKING_CODECS:
            raise DataError(f"codec {self.codec!r}: is unknown; choose one of {', '.join(PACKING_CODECS)}")
        most = math.isqrt(MOST_PIXELS)
        if not 1 <= self.resolution <= most:
            raise DataError(f"resolution {self.resolution}: is not in 1..{most} pixels per side")
        if self.samples_per_shard < 1:
            raise DataError(f"samples per shard {self.samples_per_shard}: at least 1 is needed; the default is 1000")
        if self.channels not in CHANNELS:
            raise DataError(f"channels {self.channels}: choose 1 (grey) or 3")
        if self.codec == ORIGINAL and self.channels != RGB:
            remedy = "leave out --channels: training reads the files with as many channels as its model has"
            raise DataError(f"channels {self.channels}: codec {ORIGINAL} keeps the files as they are; {remedy}")


def make_plan(folder: Path, options: PackingOptions, on_found: OnFound) -> None:
    """Put the plan into the folder. If several tasks do so at once, one wins, and the others use its plan.

    Raises a DataError if the input makes no sense, or the folder cannot be written to.
    """
    with data_error(f"{folder}: cannot be written to", "choose another --output"):
        folder.mkdir(parents=True, exist_ok=True)
        foreign = next(folder.glob("*.tar"), None)
        scratch = tempfile.TemporaryDirectory(prefix=f"{FOLDER}.", suffix=".partial", dir=folder)
    with scratch:
        if foreign is not None and not (folder / FOLDER).exists():  # another task may just have begun
            raise DataError(f"{foreign}: is there, but belongs to no packing job; remove it or choose another --output")
        inputs = find_sources(options.input, options.finding, on_found)
        aside = Path(scratch.name) / FOLDER
        try:
            aside.mkdir()
            with atomic_write(aside / _INPUTS) as file:
                inputs.write(file)
            plan = {
                "options": _recorded(options),
                "root": os.getcwd(),
                "images": len(inputs),
                "num_classes": inputs.num_classes,
                "class_names": inputs.class_names,
                "ignored": dict(inputs.ignored),
                "notes": inputs.notes,
                "inputs_sha256": sha256_of(aside / _INPUTS),
            }
            write_json(aside / _PLAN, plan)
            # The rename fails if the folder exists, on any file system. So exactly one task wins.
            aside.rename(folder / FOLDER)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and (folder / MANIFEST).exists():
                return  # other tasks have finished the job, and removed this plan as a leftover
            if not (folder / FOLDER / _PLAN).exists():
                what = f"the plan cannot be written ({error.strerror})"
                raise DataError(f"{folder}: {what}; make room and start again") from error


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` to the file `path`, whole or not at all."""
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=1).encode())


def read_plan(folder: Path) -> tuple[dict[str, Any], SourceTable]:
    """The plan, and the images to pack. Raises a DataError if it is damaged, an OSError if others have finished."""
    path = folder / FOLDER
    try:
        plan = json.loads((path / _PLAN).read_bytes())
        if sha256_of(path / _INPUTS) != plan["inputs_sha256"]:
            raise ValueError(f"{_INPUTS} is not what {_PLAN} describes")
        inputs = SourceTable.read(path / _INPUTS, plan["num_classes"], plan["class_names"])
        inputs.ignored.update(plan["ignored"])
        inputs.notes.extend(plan["notes"])
        plan["options"] = _from_root(plan["options"], plan["root"])
    except (OSError, *DAMAGED_JSON) as error:
        lost = isinstance(error, FileNotFoundError)
        if lost and (folder / MANIFEST).exists():
            raise
        what = "is not whole" if lost else f"cannot be read ({error})"
        raise DataError(f"{path}: {what}; remove it and start again; all shards are then written again") from error
    return plan, inputs


def refuse_other_options(folder: Path, options: PackingOptions, begun: dict[str, Any]) -> None:
    """Raise a DataError if the job in `folder` was `begun` with other options."""
    given = _from_root(_recorded(options), os.getcwd())
    flags = {key: f"--{key.replace('_', '-')}" for key in given if begun.get(key) != given[key]}
    if flags:
        was = " ".join(f"{flag} {_shown(begun.get(key))}" for key, flag in flags.items())
        now = " ".join(f"{flag} {_shown(given[key])}" for key, flag in flags.items())
        raise DataError(f"{folder}: was begun with {was}, not with {now}; give the same options or another --output")


def write_options(folder: Path, options: PackingOptions, root: str) -> None:
    """Store the options of a finished job. Relative paths of the input start at `root`."""
    write_json(folder / _OPTIONS, {"options": _from_root(_recorded(options), root), "root": "/"})


def refuse_options_unlike_kept(folder: Path, options: PackingOptions) -> None:
    """Raise a DataError if `folder` has stored options (see `write_options`) that differ or are damaged."""
    path = folder / _OPTIONS
    if path.exists():
        with data_error(f"{path}: cannot be read", "remove it: the shards do not need it", (OSError, *DAMAGED_JSON)):
            begun = json.loads(path.read_bytes())
            begun = _from_root(begun["options"], begun["root"])
        refuse_other_options(folder, options, begun)


def _recorded(options: PackingOptions) -> dict[str, Any]:
    """The options by the names of their flags, with `_` in place of `-`."""
    values = asdict(options)
    return {**values, **values.pop("finding")}


def _from_root(options: dict[str, Any], folder: str) -> dict[str, Any]:
    """`options` with absolute paths of the input; the given ones are relative to `folder`."""
    paths = options["input"]
    absolute = [path if is_address(path) else os.path.normpath(os.path.join(folder, path)) for path in paths]
    return {**options, "input": absolute}


def _shown(value: object) -> str:
    if value is None:
        return "absent"
    if isinstance(value, list):
        return " ".join(map(str, value[:_FEW])) + (f" ... ({len(value)})" if len(value) > _FEW else "")
    return str(value)
