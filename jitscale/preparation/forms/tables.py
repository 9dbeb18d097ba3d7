"""Tables of images: every line of a .csv, .tsv, .jsonl, .parquet or .txt has a path, and maybe a label."""

import csv
import io
import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from jitscale.data.images import EXTENSIONS
from jitscale.errors import DataError, data_error
from jitscale.preparation.forms.search import Found, Images, Label, Search, extension_of

TABLES = ("csv", "tsv", "jsonl", "parquet", "txt")

_FORMS = {"csv": "CSV", "tsv": "CSV with tabs", "jsonl": "JSON lines", "txt": "lines such as 'a.jpg 0'"}
_INDEX = "__index_level_0__"  # pandas' column of row numbers
_BATCH = 1024  # rows


class Row(NamedTuple):
    """One line of a table."""

    place: str  # place of the line, for a message
    values: dict[str, object]
    header: str  # the place of the names of the columns, for a message


def images_in_table(search: Search, table: Path) -> Images:
    """The images that the lines of `table` name. Relative paths start at its folder."""
    listed: set[str] = set()
    with data_error(f"{table}: cannot be read as a table", "make it readable"), table.open("rb") as file:
        for place, path, label in labelled_paths(search, rows_of(str(table), file)):
            if path in listed:
                raise DataError(f"{place}: lists {path!r} again; every image must come once, remove one of the lines")
            listed.add(path)
            if extension_of(path) not in EXTENSIONS:
                raise DataError(f"{place}: {path!r} is no image by its name; expected {', '.join(EXTENSIONS)}")
            yield Found(os.path.join(table.parent, path), extension_of(path), label, place)


def labelled_paths(search: Search, rows: Iterator[Row], *, ids: bool = False) -> Iterator[tuple[str, str, Label]]:
    """Place, path and label of each row. With `ids`, the first column may hold the paths under any name.

    Raises a DataError if there are no rows, a path is missing, or the column of the labels is not clear.
    """
    columns: dict[tuple[str, ...], tuple[str, str | None]] = {}
    place = ""
    for place, values, header in rows:
        names = tuple(values)
        if names not in columns:
            columns[names] = _columns(search, header, names, ids=ids)
        path_column, label_column = columns[names]
        path, label = values[path_column], None if label_column is None else values[label_column]
        if isinstance(path, int) and not isinstance(path, bool) and ids:
            path = str(path)
        if not isinstance(path, str) or not path:
            raise DataError(f"{place}: has no path; give every line the path of an image")
        if label is not None and (isinstance(label, bool) or not isinstance(label, (str, int))):
            raise DataError(f"{place}: label {label!r} is neither an integer nor a name; correct it")
        yield place, path, search.label(None if label is None else str(label).strip(), place)


def _columns(search: Search, place: str, names: Collection[str], *, ids: bool) -> tuple[str, str | None]:
    """The columns of paths and of labels; the second is None if the images have no labels."""
    columns = [name for name in names if name != _INDEX]
    listed = ", ".join(map(repr, columns)) or "nothing"
    paths = [name for name in columns if name in ("path", "file_name")]
    paths = paths or [name for name in columns if name.endswith("_file_name")]
    if len(paths) > 1 and "path" not in paths:
        raise DataError(f"{place}: several columns name files ({', '.join(paths)}); call that of the images file_name")
    if not paths and not (ids and len(columns) > 1):
        what = f"no column 'path' among {listed}"
        remedy = "begin the file with the line path,label (or path), separated by commas; file_name is path too"
        raise DataError(f"{place}: {what}; {remedy}")
    path = "path" if "path" in paths else (paths or columns)[0]
    others = [name for name in columns if name != path]
    chosen = search.option("label_column")
    if search.without_labels() or (chosen is None and not others):
        return path, None
    if chosen is None and ("label" in others or (ids and len(others) == 1)):
        return path, "label" if "label" in others else others[0]
    if chosen not in others:
        what = f"no {chosen or 'label'!r} among {listed}"
        raise DataError(f"{place}: {what}; pass --label-column with one of these, or --labels none for no labels")
    return path, chosen


def rows_of(place: str, file: IO[bytes]) -> Iterator[Row]:
    """The rows of the table `place`, whose name says its kind. Raises a DataError if it is damaged or empty."""
    kind = extension_of(place)
    if kind == "parquet":
        rows = _parquet_rows(file, place)
    else:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        rows = {"csv": _csv_rows, "tsv": _csv_rows, "jsonl": _json_rows, "txt": _text_rows}[kind](text, place)
    empty = True
    while True:
        damage = (OSError, UnicodeDecodeError, csv.Error)
        with data_error(
            f"{place}: cannot be read as a table", f"write it as {_FORMS.get(kind, kind)} in UTF-8", damage
        ):
            row = next(rows, None)
        if row is None:
            break
        empty = False
        yield row
    if empty:
        raise DataError(f"{place}: has no lines with images; give a path in every line")


def _csv_rows(file: IO[str], place: str) -> Iterator[Row]:
    reader = csv.DictReader(file, strict=True, delimiter="\t" if extension_of(place) == "tsv" else ",")
    header = f"{place}: line 1"
    if not reader.fieldnames:
        raise DataError(f"{header}: no column 'path' among nothing; begin the file with the line path,label")
    for row in reader:
        values = {name: row[name] or None for name in reader.fieldnames}
        yield Row(f"{place}: line {reader.line_num}", dict(values), header)
    if reader.line_num == 1:
        columns = ", ".join(map(repr, reader.fieldnames))
        what = f"has no lines with images below the columns {columns}"
        raise DataError(f"{place}: {what}; begin it with the line path,label, then one line an image")


def _json_rows(file: IO[str], place: str) -> Iterator[Row]:
    for line, text in enumerate(file, start=1):
        here = f"{place}: line {line}"
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f'{here}: no JSON ({error}); write {{"path": ..., "label": ...}}') from error
        if not isinstance(row, dict):
            raise DataError(f'{here}: no object; write {{"path": ..., "label": ...}}')
        yield Row(here, row, here)


def _text_rows(file: IO[str], place: str) -> Iterator[Row]:
    for line, text in enumerate(file, start=1):
        here = f"{place}: line {line}"
        path, tab, rest = text.strip().partition("\t")
        # With tabs, more columns may follow, such as the boxes of tiny-imagenet's val_annotations.txt.
        label = rest.partition("\t")[0].strip()
        if not tab:
            path, _, label = text.strip().rpartition(" ")
        if not text.strip():
            continue
        if not path:
            raise DataError(f"{here}: {text.strip()!r} is no image and label; write lines such as 'a.jpg 0'")
        yield Row(here, {"path": path.strip(), "label": label}, here)


def _parquet_rows(file: IO[bytes], place: str) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException  # noqa: PLC0415  # an extra
        from pyarrow.parquet import ParquetFile  # noqa: PLC0415
    except ImportError as error:
        raise DataError(f"{place}: needs {error.name}, which is missing; pip install 'jitscale[parquet]'") from error
    number = 0
    with data_error(f"{place}: cannot be read as parquet", "write it again", (OSError, ArrowException)):
        for batch in ParquetFile(file).iter_batches(batch_size=_BATCH):
            for values in batch.to_pylist():
                yield Row(f"{place}: row {number}", values, f"{place}: row 0")
                number += 1
