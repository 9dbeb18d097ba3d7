"""Reads the rows of `data` in an .npz file, by offset or, if it is compressed, in order.

A compressed array is inflated from its beginning, and only up to the requested row. One row at a time is in memory.
"""

import zipfile
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import IO

import numpy as np

from jitscale.data.images import ImageError, UInt8Array

_LOCAL_HEADER = 30  # bytes of a zip's local header before its name
_DATA = "data.npy"
_SKIP = 1 << 20  # bytes that are inflated at once while rows are skipped


@dataclass(frozen=True)
class ArrayHeader:
    """The .npy header of `data`."""

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    column_major: bool
    size: int  # bytes of the header itself

    @property
    def count(self) -> int:
        """The number of images."""
        return self.shape[0]

    @property
    def row_bytes(self) -> int:
        """The bytes of one image."""
        return int(np.prod(self.shape[1:]))

    @property
    def has_planes(self) -> bool:
        """True if an image is three square planes: (3 S S,) or (3, S, S)."""
        side = isqrt(self.row_bytes // 3)
        return 3 * side * side == self.row_bytes and self.shape[1:] in ((self.row_bytes,), (3, side, side))

    @property
    def is_images(self) -> bool:
        """True if the array holds RGB images of a form that is read."""
        is_stack = len(self.shape) == 4 and self.shape[3] == 3
        sound = self.dtype == np.uint8 and not self.column_major and len(self.shape) > 1 and self.row_bytes > 0
        return sound and (is_stack or self.has_planes)

    def image(self, row: bytes) -> UInt8Array:
        """The image (H, W, 3) in the bytes `row`."""
        if self.has_planes:
            side = isqrt(self.row_bytes // 3)
            return np.frombuffer(row, np.uint8).reshape(3, side, side).transpose(1, 2, 0)
        return np.frombuffer(row, np.uint8).reshape(self.shape[1:])


def header_of(archive: zipfile.ZipFile) -> ArrayHeader:
    """The header of `data`. Raises a KeyError if there is none, a ValueError if it is damaged."""
    with archive.open(_DATA) as file:
        return _read_header(file)


def _read_header(file: IO[bytes]) -> ArrayHeader:
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"an .npy header of version {version}")
    shape, column_major, dtype = read(file)
    return ArrayHeader(shape, dtype, column_major, file.tell())


def offset_of(path: Path, info: zipfile.ZipInfo, header: ArrayHeader) -> int:
    """The byte of the zip `path` where the first row of its member `info` begins, if that is not compressed."""
    with path.open("rb") as file:
        file.seek(info.header_offset)
        local = file.read(_LOCAL_HEADER)  # its extra field may differ in length from that in the directory
    name, extra = (int.from_bytes(local[at : at + 2], "little") for at in (26, 28))
    return info.header_offset + _LOCAL_HEADER + name + extra + header.size


class ArrayRows:
    """The images of one .npz file. Read them in ascending order."""

    def __init__(self, path: str) -> None:
        """Open the file. Raises an OSError, zipfile.BadZipFile, KeyError or ValueError if it is no such file."""
        self.path = path
        self._archive = zipfile.ZipFile(path)
        self._file, self.header, self._next = self._opened()

    def image(self, row: int) -> UInt8Array:
        """Image `row`, (H, W, 3). Raises an ImageError if the file ends too early, and the errors of the zip reader."""
        if row < self._next:
            self._file.close()
            self._file, self.header, self._next = self._opened()
        size = self.header.row_bytes
        left = (row - self._next) * size
        while left and (skipped := len(self._file.read(min(left, _SKIP)))):
            left -= skipped
        data = self._file.read(size)
        if len(data) < size:
            raise ImageError(f"ends after {len(data)} of {size} bytes")
        self._next = row + 1
        return self.header.image(data)

    def _opened(self) -> tuple[IO[bytes], ArrayHeader, int]:
        """The opened member, its header, and the number of the next row."""
        file = self._archive.open(_DATA)
        return file, _read_header(file), 0
