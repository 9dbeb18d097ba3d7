"""Files whose rows hold images: Parquet and Arrow. All use of pyarrow, which is an extra, is here.

Rows come in batches, in the order of the file. Only the requested columns are read, so memory stays bounded. Rows of a
group lie together: a row group of Parquet, or all rows of an Arrow file.
"""

import io
import json
import sys
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from itertools import accumulate
from typing import Any

from jitscale.data.images import ImageError
from jitscale.data.remote import retried
from jitscale.errors import DataError, data_error, first_line
from jitscale.preparation.sources import Storage, is_address

_IMAGES = 64  # rows in a batch with images
_BUFFER = 1 << 20  # bytes that are read at once; by default pyarrow holds the images of a whole row group
_MAPPED = 100  # rows of a mapped stream that stay neighbours
_DECODED = 1000  # rows of a row group that stay neighbours: to begin inside it, all rows before must be decoded
_PASSED_OVER = 8 << 30  # most bytes of one row group that may be decoded only to get to later rows
_END = b"\xff\xff\xff\xff\0\0\0\0"  # last bytes of an Arrow stream
_FILE_MAGIC = b"ARROW1"  # first bytes of an Arrow file with a footer
_BYTES, _PATH = "bytes", "path"  # fields of an image's struct, as the Hugging Face hub has it


class Column(Enum):
    """The kinds of content of a column."""

    STRUCT = auto()  # an image: its bytes, and maybe its path
    BINARY = auto()  # an image: its bytes
    VALUES = auto()  # labels: numbers or text
    OTHER = auto()


@dataclass(frozen=True)
class Batch:
    """Some rows of one group."""

    first: int  # number of the first row in the file
    group: int
    rows: int
    columns: Any  # pyarrow.RecordBatch with the requested columns; None if none was requested

    def values(self, column: str) -> list[object]:
        """The values of a column, one per row."""
        array = self.columns.column(column)
        return (array.dictionary_decode() if hasattr(array, "dictionary_decode") else array).to_pylist()

    def images(self, image: str) -> Any:
        """The bytes of each image, as a pyarrow array."""
        return self._field(image, _BYTES)

    def paths(self, image: str) -> list[str | None]:
        """The path of each image, if the file says it."""
        found = None if self.columns is None or image not in self.columns.schema.names else self._field(image, _PATH)
        return [None] * self.rows if found is None else found.to_pylist()

    def _field(self, image: str, name: str) -> Any:
        """The field `name` of the struct `image`; None if it has no such field, or is no struct."""
        array = self.columns.column(image)
        if not hasattr(array, "field"):
            return array if name == _BYTES else None
        fields = {array.type.field(number).name: number for number in range(array.type.num_fields)}
        return array.field(fields[name]) if name in fields else None


@dataclass(frozen=True)
class Stored:
    """The storage of a group's images."""

    without_bytes: bool  # as far as is known, no image has bytes, at most a path
    mean: int  # bytes of an image
    together: int  # the number of rows that should be read one after the other


class RowFile(ABC):
    """An open file of rows."""

    def __init__(self, path: str, schema: Any) -> None:
        self.path = path
        self._schema = schema

    @abstractmethod
    def batches(self, columns: Sequence[str], rows: int = 0, start: int = 0) -> Iterator[Batch]:
        """All rows from the group of row `start` on, at most `rows` at a time (0: as many as the file has in a batch).

        `columns` are names, or the fields `image.bytes` and `image.path` of a column. Raises as `damage` does.
        """

    @abstractmethod
    def stored(self, image: str, batch: Batch) -> Stored:
        """The storage of the images of the column `image` in the group of `batch`."""

    @abstractmethod
    def end_of_way(self, batch: Batch) -> int:
        """Rows up to this one are reached fastest by reading on from `batch`; later rows by beginning anew."""

    def columns(self) -> dict[str, Column]:
        """All columns of the file, in order."""
        return {field.name: _column(field.type) for field in self._schema}

    def features(self) -> dict[str, Any]:
        """The notes of the library `datasets` about each column; empty for files of other programs."""
        found: Any = (self._schema.metadata or {}).get(b"huggingface")
        if found is None:
            return {}
        with data_error(f"{self.path}: its 'huggingface' metadata cannot be read", "write it again", ValueError):
            found = json.loads(found)
        for key in ("info", "features"):
            found = found.get(key) if isinstance(found, dict) else None
        return found if isinstance(found, dict) else {}

    def bytes_of(self, image: str) -> str:
        """The name of the bytes of the column `image`, for `batches`."""
        return self._field(image, _BYTES) or image

    def path_of(self, image: str) -> str | None:
        """The name of the paths of the column `image`, for `batches`; None if it has no paths."""
        return self._field(image, _PATH)

    def _field(self, image: str, name: str) -> str | None:
        kind = self._schema.field(image).type
        names = [kind.field(number).name for number in range(kind.num_fields)]
        return f"{image}.{name}" if name in names else None


def open_rows(path: str, storage: Storage) -> RowFile:
    """The file, or the address, `path`. Raises a DataError if it is damaged, or pyarrow is missing."""
    try:
        import pyarrow  # noqa: F401, PLC0415  # an extra, and slow to import
    except ImportError as error:
        raise DataError(f"{path}: needs {error.name}, which is missing; pip install 'jitscale[parquet]'") from error
    with damage(path):
        return _ParquetRows(path) if storage == Storage.PARQUET else _ArrowRows(path)


@contextmanager
def damage(path: str) -> Iterator[None]:
    """Turn the errors of pyarrow about the file `path` into a DataError."""
    from pyarrow import ArrowException  # noqa: PLC0415  # as above

    try:
        with data_error(f"{path}: cannot be read", "download or write it again", OSError):
            yield
    except ArrowException as error:
        what = f"is damaged, or pyarrow cannot read it ({first_line(error)})"
        raise DataError(f"{path}: {what}; download or write it again") from error


class _ParquetRows(RowFile):
    def __init__(self, path: str) -> None:
        from pyarrow.parquet import ParquetFile  # noqa: PLC0415  # as above

        source = _RemoteFile(path) if is_address(path) else path
        self._file = ParquetFile(source, buffer_size=_BUFFER, pre_buffer=False)
        super().__init__(path, self._file.schema_arrow)
        metadata = self._file.metadata
        self._starts = list(
            accumulate((metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)), initial=0)
        )
        leaves = [metadata.schema.column(number).path for number in range(metadata.num_columns)]
        self._numbers = {name: number for number, name in enumerate(leaves)}

    def batches(self, columns: Sequence[str], rows: int = 0, start: int = 0) -> Iterator[Batch]:
        for group in range(bisect_right(self._starts, start) - 1, len(self._starts) - 1):
            first, size = self._starts[group], self._starts[group + 1] - self._starts[group]
            if not columns:
                yield Batch(first, group, size, None)
                continue
            options = {"batch_size": rows or size or 1, "row_groups": [group], "columns": list(columns)}
            for batch in self._file.iter_batches(**options, use_threads=False):
                yield Batch(first, group, len(batch), batch)
                first += len(batch)

    def end_of_way(self, batch: Batch) -> int:
        return self._starts[batch.group + 1]

    def stored(self, image: str, batch: Batch) -> Stored:
        chunk = self._file.metadata.row_group(batch.group).column(self._numbers[self.bytes_of(image)])
        rows = self._starts[batch.group + 1] - self._starts[batch.group]
        counts = chunk.statistics
        empty = counts is not None and counts.has_null_count and counts.null_count == rows
        empty = empty or chunk.physical_type != "BYTE_ARRAY"  # pandas writes another type if it met no value
        size = max(chunk.total_uncompressed_size, 1)
        blocks = min(-(-rows // _DECODED), max(_PASSED_OVER // size, 1))
        together = -(-rows // blocks)
        return Stored(empty, size // rows, together)


class _ArrowRows(RowFile):
    """A memory-mapped file; its batches are used in place."""

    def __init__(self, path: str) -> None:
        import pyarrow  # noqa: PLC0415  # as above

        self._file = pyarrow.memory_map(path)
        self._has_footer = self._file.read(len(_FILE_MAGIC)) == _FILE_MAGIC
        if not self._has_footer:
            self._file.seek(max(self._file.size() - len(_END), 0))
            if self._file.read() != _END:
                raise DataError(f"{path}: ends without the end of an Arrow stream; copy or write it again")
        super().__init__(path, self._reader().schema)

    def batches(self, columns: Sequence[str], rows: int = 0, start: int = 0) -> Iterator[Batch]:
        first = 0
        for batch in self._all_batches():
            if first + len(batch) > start:
                size = rows or len(batch) or 1
                for at in range(0, len(batch), size):
                    part = batch.slice(at, size)
                    yield Batch(first + at, 0, len(part), part)
            first += len(batch)

    def end_of_way(self, batch: Batch) -> int:
        return sys.maxsize  # skipped batches are only mapped, not read

    def stored(self, image: str, batch: Batch) -> Stored:
        found = batch.images(image)
        # Batches of a file with a footer may be compressed, so they are read in order. Those of a stream rarely are.
        together = sys.maxsize if self._has_footer else _MAPPED
        return Stored(found.null_count == batch.rows, found.nbytes // batch.rows, together)

    def _all_batches(self) -> Iterator[Any]:
        reader = self._reader()
        if self._has_footer:
            return (reader.get_batch(number) for number in range(reader.num_record_batches))
        return iter(reader)

    def _reader(self) -> Any:
        from pyarrow import ipc  # noqa: PLC0415  # as above

        self._file.seek(0)
        return ipc.open_file(self._file) if self._has_footer else ipc.open_stream(self._file)


class ImageRows:
    """The images of one file. Ask for its rows in ascending order."""

    def __init__(self, file: RowFile, image: str) -> None:
        """`image` is the column."""
        self._file, self._image = file, image
        self._batches: Iterator[Batch] = iter(())
        self._batch: Batch | None = None

    def read(self, row: int) -> bytes:
        """The bytes of an image. Raises an ImageError if it has none or is damaged, an OSError if the storage fails."""
        from pyarrow import ArrowException  # noqa: PLC0415  # as above

        try:
            batch = self._batch_of(row)
        except ArrowException as error:
            self._batch = None
            raise ImageError(f"cannot be read ({first_line(error)})") from error
        if batch is None:
            raise ImageError("is not there: the file has fewer rows than before")
        data: bytes | None = batch.images(self._image)[row - batch.first].as_py()
        if data is None:
            raise ImageError("has no bytes")
        return data

    def _batch_of(self, row: int) -> Batch | None:
        """The batch with this row, if there is one."""
        batch, self._batch = self._batch, None
        if batch is None or not batch.first <= row < self._file.end_of_way(batch):
            self._batches = self._file.batches([self._file.bytes_of(self._image)], _IMAGES, row)
            batch = next(self._batches, None)
        while batch is not None and row >= batch.first + batch.rows:
            batch = next(self._batches, None)
        self._batch = batch
        return batch


class _RemoteFile(io.RawIOBase):
    """A file on the hub. A failed read is tried again, as for all remote storage."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self._address = address
        self._position = 0
        self._file = self._opened()
        self._size: int = retried(address, lambda: self._file.seek(0, io.SEEK_END))

    def readinto(self, buffer: Any) -> int:
        def attempt() -> bytes:
            self._file.seek(self._position)
            return self._file.read(len(buffer))

        data: bytes = retried(self._address, attempt)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def _opened(self) -> Any:
        import fsspec  # noqa: PLC0415  # only addresses need it

        return retried(self._address, lambda: fsspec.open(self._address, "rb").open())


def _column(kind: Any) -> Column:
    from pyarrow import types  # noqa: PLC0415  # as above

    if types.is_struct(kind):
        fields = {kind.field(number).name: kind.field(number).type for number in range(kind.num_fields)}
        unfilled = _PATH in fields and types.is_null(fields.get(_BYTES, kind))  # all images are given by path
        return Column.STRUCT if unfilled or _is_binary(fields.get(_BYTES)) else Column.OTHER
    if _is_binary(kind):
        return Column.BINARY
    numbers = types.is_integer(kind) or types.is_floating(kind) or types.is_null(kind)
    text = types.is_dictionary(kind) or str(kind) in ("string", "large_string", "string_view")
    return Column.VALUES if numbers or text else Column.OTHER


def _is_binary(kind: Any) -> bool:
    return str(kind) in ("binary", "large_binary", "binary_view")
