"""Finds the split of a file by its name, as the Hugging Face hub and the library `datasets` name files.

data/train-00000-of-00294.parquet (older files end in a hash); CONFIG/train/0000.parquet (the hub's conversions)
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from jitscale.errors import DataError
from jitscale.preparation.forms.search import Search
from jitscale.preparation.sources import is_address

_NUMBERED = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(-[0-9a-f]{16})?")
_WORDS = {"training": "train", "val": "validation", "valid": "validation", "dev": "validation", "testing": "test"}
_SPLITS = ("train", "validation", "test", *_WORDS)
_PARTIAL = "partial-"  # the hub converts only the first 5 GB of such a split
_DATA = "data"  # a folder that is no configuration


@dataclass(frozen=True)
class _Part:
    """The facts in the name of a file."""

    path: str
    configuration: str  # the folder of all its splits
    split: str  # empty: the name says none
    number: int = 0  # among the files of its split
    count: int = 0  # number of files of its split; 0: the name says none
    is_partial: bool = False  # only a part of its split was converted


def files_of_split(search: Search, place: str, files: Sequence[str], *, whole: bool) -> tuple[list[str], str]:
    """The files of the split that the user wants, and the name of their configuration.

    If `whole`, the input `place` must hold all files of a split. Raises a DataError if the split is not clear, if files
    are missing, or if they belong to several configurations.
    """
    parts = [_part_of(path) for path in files]
    splits = sorted({part.split for part in parts})
    chosen = _chosen(search, place, splits)
    parts = [part for part in parts if part.split == chosen]
    configurations = sorted({part.configuration for part in parts})
    if len(configurations) > 1:
        what = f"holds several data sets ({', '.join(configurations)})"
        raise DataError(f"{place}: {what}; give one of these folders")
    if any(part.is_partial for part in parts):
        what = f"holds only the first 5 GB of the split {chosen} (folder {_PARTIAL}{chosen})"
        raise DataError(f"{place}: {what}; give the data set's own files")
    _refuse_missing(search, place, parts, whole=whole)
    if len(splits) > 1:
        search.note(f"{place}: the split {chosen} of {', '.join(filter(None, splits))}")
    return [part.path for part in parts], PurePosixPath(configurations[0]).name


def _part_of(path: str) -> _Part:
    folder, _, name = (path if is_address(path) else os.path.abspath(path)).rpartition("/")
    is_data = folder.endswith(f"/{_DATA}")
    outer, _, inner = folder.rpartition("/")
    above = "" if is_data else inner.removeprefix(_PARTIAL)
    stem = PurePosixPath(name).stem
    if numbered := _NUMBERED.fullmatch(stem):
        stem = numbered["name"]
    split = stem.rpartition("-")[2]  # NAME-train in a cache of `datasets`
    if split not in _SPLITS:
        words = {word for word in re.split(r"[-._ \d]+", stem) if word in _SPLITS}
        if not numbered and len(words) == 1:
            split = words.pop()
        elif above in _SPLITS or (stem.isdigit() and above):
            split = above
        elif not numbered:
            split = ""
    configuration = outer if is_data or above == split else folder
    counts = (int(numbered["number"]), int(numbered["count"])) if numbered else (0, 0)
    return _Part(path, configuration, split, *counts, is_partial=inner.startswith(_PARTIAL))


def _chosen(search: Search, place: str, splits: list[str]) -> str:
    """The split to read, one of `splits`."""
    wanted = search.option("split") if splits != [""] else None
    if wanted is None and len(splits) == 1:
        return splits[0]
    same = [split for split in splits if split == wanted] or [
        split for split in splits if wanted and _WORDS.get(split, split) == _WORDS.get(wanted, wanted)
    ]
    if len(same) == 1:
        return same[0]
    there = ", ".join(split or "another" for split in splits)
    given = f", not {wanted}" if wanted else ""
    first = "train" if "train" in splits else next(filter(None, splits))
    kind = "splits" if len(splits) > 1 else "split"
    raise DataError(f"{place}: holds the {kind} {there}{given} by the names of its files; pass --split {first}")


def _refuse_missing(search: Search, place: str, parts: Sequence[_Part], *, whole: bool) -> None:
    counts = sorted({part.count for part in parts if part.count})
    if not counts:
        return
    count = counts[0]
    if len(counts) > 1:
        what = f"holds files of {' and of '.join(map(str, counts))} of one split, from two versions of the data set"
        raise DataError(f"{place}: {what}; remove the older ones")
    numbers = [part.number for part in parts if part.count]
    if missing := sorted(set(range(count)) - set(numbers)):
        what = f"{len(set(numbers))} of the {count} files of the split {parts[0].split}"
        if whole:
            remedy = "download the rest, or give those that are there as a pattern"
            raise DataError(f"{place}: holds {what}; number {missing[0]:05d} is missing; {remedy}")
        search.note(f"{place}: {what}")
    elif len(set(numbers)) < len(numbers):
        raise DataError(f"{place}: holds a file of the split {parts[0].split} twice; remove one")
