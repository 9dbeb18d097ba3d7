"""Reads the bytes of one image, however it is stored."""

import errno
import stat
import zipfile
import zlib
from functools import lru_cache
from math import isqrt

import numpy as np

from jitscale.data import tar_index
from jitscale.data.images import ImageError, content_extension, encode
from jitscale.data.tar_index import OffsetReader
from jitscale.errors import DataError, StorageError, first_line, is_wrong_path
from jitscale.preparation.array_rows import ArrayRows
from jitscale.preparation.forms.columns import image_column
from jitscale.preparation.forms.kinds import LFS_POINTER
from jitscale.preparation.row_files import ImageRows, open_rows
from jitscale.preparation.sources import Source, Storage, located

MOST_BYTES = 1 << 30  # limit for one image's file; larger files are not images, and are never loaded

_MOST_OPEN_FILES = 256  # limit for each process; 1024 is a usual limit of the system
_DAMAGED_ARRAYS = (zipfile.BadZipFile, zlib.error, EOFError, KeyError)
# These are faults of the process, not of the file: to continue would drop good images.
_OUR_FAULT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class SourceReader:
    """Reads images one after the other. Neighbours in a row group cost little, see `SourceTable.order`."""

    def __init__(self, root: str, image_column: str | None = None) -> None:
        """Relative paths of sources start at `root`. `image_column` is for files with several columns of images."""
        self._root = root
        self._image_column = image_column
        self._open_file = lru_cache(_MOST_OPEN_FILES)(self._opened)
        self._open_arrays = lru_cache(1)(self._opened_arrays)

    def read(self, source: Source) -> tuple[bytes, str]:
        """The bytes of an image and its extension, one of EXTENSIONS.

        Raises an ImageError if the image is bad, a StorageError if the disk fails, a DataError if this process fails.
        """
        try:
            if source.storage == Storage.ARRAY:
                extension, data = encode(self._open_arrays(source.path).image(source.offset), "raw")
                return data, extension
            data = self._stored(source)
        except tar_index.ShortReadError as error:
            raise ImageError(str(error)) from error
        except _DAMAGED_ARRAYS as error:
            raise ImageError(f"cannot be read ({error})") from error
        except OSError as error:
            what = f"cannot be read ({error.strerror or first_line(error)})"
            if error.errno in _OUR_FAULT:
                remedy = "raise the limits of the process, or use fewer workers"
                raise DataError(f"{source.place}: {what}; {remedy}") from error
            if not is_wrong_path(error):  # good images must not be left out because a file server was away
                remedy = "give the same command when the storage works; a removed file is listed as a bad image"
                raise StorageError.of(error, f"{source.place}: {what}; {remedy}") from error
            raise ImageError(what) from error
        if source.storage == Storage.PLANES:
            extension, data = _from_planes(data)
            return data, extension
        if data.startswith(LFS_POINTER):
            raise ImageError(f"is a git-lfs pointer of {len(data)} bytes, not the data; run git lfs pull")
        return data, source.extension or content_extension(data)

    def _stored(self, source: Source) -> bytes:
        if source.storage in (Storage.PARQUET, Storage.ARROW):
            return _image_rows(located(source.path, self._root), source.storage, self._image_column).read(source.offset)
        file = self._open_file(source.path)
        size = file.status().st_size if source.storage == Storage.FILE else source.size
        if size > MOST_BYTES:
            raise ImageError(f"has {size} bytes; the limit is {MOST_BYTES}")
        data = file.read(source.offset, size)
        return _inflated(data) if source.storage == Storage.DEFLATED else data

    def _opened_arrays(self, path: str) -> ArrayRows:
        return ArrayRows(located(path, self._root))

    def _opened(self, path: str) -> OffsetReader:
        if "\0" in path:
            raise ImageError("has a name that no file can have")
        file = OffsetReader(located(path, self._root))
        if not stat.S_ISREG(file.status().st_mode):
            raise ImageError("is no regular file")
        return file


@lru_cache(1)
def _image_rows(path: str, storage: Storage, chosen: str | None) -> ImageRows:
    """The rows of a file; kept by the process, because a shard continues in the row group where the last one ended."""
    file = open_rows(path, storage)
    return ImageRows(file, image_column(file, chosen))


def _inflated(data: bytes) -> bytes:
    """The bytes that a zip stores compressed as `data`."""
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        inflated = stream.decompress(data, MOST_BYTES)
    except zlib.error as error:
        raise ImageError(f"cannot be inflated ({error})") from error
    if not stream.eof:
        raise ImageError(f"has more than {MOST_BYTES} bytes, or its compressed bytes end too early")
    return inflated


def _from_planes(data: bytes) -> tuple[str, bytes]:
    """Extension and bytes of an image that is stored as three planes, see `encode`."""
    side = isqrt(len(data) // 3)
    planes = np.frombuffer(data, np.uint8).reshape(3, side, side)
    return encode(planes.transpose(1, 2, 0), "raw")
