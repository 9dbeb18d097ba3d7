"""Tables of images: a .csv or .jsonl with a path, and maybe a label, in every line."""

import csv
import json
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO

from jitscale.data.images import EXTENSIONS
from jitscale.errors import DataError, data_error
from jitscale.preparation.forms.search import Found, Images, Search, extension_of

_Row = tuple[int, object, object]  # line, path, label


def images_in_table(search: Search, table: Path) -> Images:
    """The images of the lines of `table`; relative paths start at its folder."""
    form, rows = {".csv": ("CSV", _csv_rows), ".jsonl": ("JSON lines", _json_rows)}[table.suffix.lower()]
    yield from _images(search, table, form, rows)


def _images(search: Search, table: Path, form: str, rows: Callable[[IO[str], str], Iterator[_Row]]) -> Images:
    empty = True
    what, damage = f"{table}: cannot be read as a table", (OSError, UnicodeDecodeError, csv.Error)
    with (
        data_error(what, f"write it as {form} in UTF-8", damage),
        table.open(encoding="utf-8-sig", newline="") as file,
    ):
        for line, path, label in rows(file, f"{table}: line"):
            empty = False
            yield _image(search, table, f"{table}: line {line}", path, label)
    if empty:
        raise DataError(f"{table}: has no lines with images; give a path in every line")


def _image(search: Search, table: Path, place: str, path: object, label: object) -> Found:
    if not isinstance(path, str) or not path:
        raise DataError(f"{place}: has no path; give every line the path of an image")
    if extension_of(path) not in EXTENSIONS:
        raise DataError(f"{place}: {path!r} is no image by its name; expected {', '.join(EXTENSIONS)}")
    if label is not None and (isinstance(label, bool) or not isinstance(label, (str, int))):
        raise DataError(f"{place}: label {label!r} is neither an integer nor a name; correct it")
    text = None if label is None else str(label).strip()
    return Found(os.path.join(table.parent, path), extension_of(path), search.label(text, place), place)


def _refuse_other_columns(place: str, columns: Collection[str]) -> None:
    if "label" not in columns and set(columns) - {"path"}:
        what = f"no 'label' among {', '.join(map(repr, columns))}"
        raise DataError(f"{place}: {what}; call the labels so, or leave path alone for images without labels")


def _csv_rows(file: IO[str], place: str) -> Iterator[_Row]:
    reader = csv.DictReader(file, strict=True)
    columns = reader.fieldnames or []
    if "path" not in columns:
        what = f"no column 'path' among {', '.join(map(repr, columns)) or 'nothing'}"
        raise DataError(f"{place} 1: {what}; begin the file with the line path,label (or path), separated by commas")
    _refuse_other_columns(f"{place} 1", columns)
    for row in reader:
        yield reader.line_num, row["path"], row.get("label") or None


def _json_rows(file: IO[str], place: str) -> Iterator[_Row]:
    for line, text in enumerate(file, start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f'{place} {line}: no JSON ({error}); write {{"path": ..., "label": ...}}') from error
        if not isinstance(row, dict):
            raise DataError(f'{place} {line}: no object; write {{"path": ..., "label": ...}}')
        _refuse_other_columns(f"{place} {line}", row)
        yield line, row.get("path"), row.get("label")
