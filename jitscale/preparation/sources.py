"""The images of an input: the place of each one's bytes, and its label. A few arrays hold millions of them."""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from jitscale.keyed_random import Int64Array, Purpose, permutation

NO_GROUP = -1

# 33 bytes per image: 100 million of them in webdataset tars take 3.3 GB.
SOURCE = np.dtype(
    [
        *(("path", "<i4"), ("offset", "<i8"), ("size", "<i8"), ("label", "<i4"), ("extension", "S4")),
        *(("storage", "u1"), ("group", "<i4")),
    ]
)


class Storage(IntEnum):
    """The ways in which a file stores an image; `reading` has a reader for each."""

    FILE = 0  # the file is the image
    BYTES = 1  # `size` bytes from `offset` on
    DEFLATED = 2  # `size` bytes from `offset` on, compressed as a member of a zip
    PLANES = 3  # `size` bytes from `offset` on, a square uint8 image: all of red, then green, then blue
    PARQUET = 4  # row `offset`
    ARROW = 5  # row `offset` of a stream, or of a file with a footer
    ARRAY = 6  # row `offset` of `data` in a compressed .npz


_ROWS = (Storage.PARQUET, Storage.ARROW, Storage.ARRAY)


_ADDRESS = "hf://"  # begins the path of a file on the Hugging Face hub


def is_address(path: str) -> bool:
    """True if `path` is an address on the Hugging Face hub, not a path of this machine."""
    return path.startswith(_ADDRESS)


def located(path: str, root: str) -> str:
    """`path`, below `root` if it is relative. An address does not change."""
    return path if is_address(path) else os.path.join(root, path)


@dataclass(frozen=True)
class Source:
    """The place of one image on the disk or on the hub."""

    path: str  # a path, or an address such as hf://
    extension: str  # one of EXTENSIONS, from the name; empty: the first bytes tell
    label: int  # NO_LABEL without one
    offset: int = 0
    size: int = 0  # bytes; for a row the mean of those near it; a whole file's size is looked up when it is read
    storage: Storage = Storage.FILE

    @property
    def place(self) -> str:
        """The image's place, for a message: one line of printable text."""
        text = os.fsencode(self.path).decode("utf-8", "backslashreplace")
        plain = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
        if self.storage == Storage.FILE:
            return plain
        return f"{plain}: {'row' if self.storage in _ROWS else 'byte'} {self.offset}"


@dataclass(frozen=True)
class SourceTable:
    """All images of an input, numbered from 0, in a few arrays."""

    table: npt.NDArray[np.void]  # (images,) SOURCE
    paths: npt.NDArray[np.uint8]  # all paths, end to end
    path_ends: npt.NDArray[np.int64]  # (paths,)
    num_classes: int  # labels are below it; 0: there are no labels
    class_names: list[str] | None  # None if labels are numbers without names, or there are none
    ignored: Counter[str]  # files that were no images, by extension
    notes: list[str]  # remarks about the input for the user, one per line

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, number: int) -> Source:
        path, offset, size, label, extension, storage, _ = self.table[number].item()
        start = self.path_ends[path - 1] if path else 0
        name = os.fsdecode(self.paths[start : self.path_ends[path]].tobytes())
        return Source(name, extension.decode(), label, offset, size, Storage(storage))

    def order(self, seed: int) -> Int64Array:
        """The numbers of all images in a random order, in which images of one group stay neighbours.

        Reading one image of a group, such as a row group of a Parquet file, costs as much as reading all of them.
        """
        groups = self.table["group"]
        starts = np.flatnonzero(np.r_[True, (groups[1:] != groups[:-1]) | (groups[1:] == NO_GROUP)])
        lengths = np.diff(np.r_[starts, len(groups)])
        blocks = permutation(len(starts), seed, Purpose.PACKING_ORDER)
        if len(starts) == len(groups):
            return blocks
        lengths = lengths[blocks]
        ends = np.cumsum(lengths)
        return np.arange(ends[-1]) + np.repeat(starts[blocks] - (ends - lengths), lengths)

    def write(self, file: IO[bytes]) -> None:
        """Write the arrays; equal tables give equal bytes. Classes, ignored files and notes are not among them."""
        np.savez(file, table=self.table, paths=self.paths, path_ends=self.path_ends)

    @classmethod
    def read(cls, path: Path, num_classes: int, class_names: list[str] | None) -> SourceTable:
        """Read the file `path` that `write` wrote. Raises an OSError, ValueError or KeyError if it is no such file."""
        with np.load(path, allow_pickle=False) as arrays:
            table, paths, ends = arrays["table"], arrays["paths"], arrays["path_ends"]
        if table.dtype != SOURCE:
            raise ValueError(f"holds {table.dtype}")
        return cls(table, paths, ends, num_classes, class_names, Counter(), [])


class SourcePaths:
    """Collects the paths of a new table, in the order of its images. Neighbours with one path store it once."""

    def __init__(self) -> None:
        self._bytes, self._ends = bytearray(), array("q")
        self._last: str | None = None

    def number(self, path: str) -> int:
        """The number of `path`, as the path of the next image."""
        if path != self._last:
            self._bytes += os.fsencode(path)
            self._ends.append(len(self._bytes))
            self._last = path
        return len(self._ends) - 1

    def arrays(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        """The fields `paths` and `path_ends` of the table."""
        return np.frombuffer(bytes(self._bytes), np.uint8), np.array(self._ends, np.int64)


def rows_of(images: Sequence[tuple[int, int, int, int, bytes, int, int]]) -> npt.NDArray[np.void]:
    """Images as `SOURCE` records: path, offset, size, label, extension, storage, group."""
    return np.array(list(images), SOURCE)
