"""Files of rows, each with an image: Parquet and Arrow, alone, in a folder, or as the Hugging Face hub stores them."""

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from jitscale.data.tar_index import LARGEST_LABEL
from jitscale.errors import DataError, data_error
from jitscale.preparation.forms.columns import Columns, Names, columns_of, names_of_card, names_of_info
from jitscale.preparation.forms.file_names import files_of_split
from jitscale.preparation.forms.kinds import Kind, kind_of
from jitscale.preparation.forms.listing import Listing, listing_of
from jitscale.preparation.forms.search import PICTURES, Found, Images, Label, Search, extension_of
from jitscale.preparation.forms.wnids import WnidCheck
from jitscale.preparation.row_files import Batch, RowFile, damage, open_rows
from jitscale.preparation.sources import Storage, is_address

ROW_KINDS = {
    Kind.PARQUET: Storage.PARQUET,
    Kind.ARROW_STREAM: Storage.ARROW,
    Kind.ARROW_FILE: Storage.ARROW,
}
CARD = "README.md"  # the card of a data set on the hub

_ROWS = ("parquet", "arrow", "feather")  # extensions of such files
_TABLE = "metadata.parquet"  # table of an image folder, next to the images
_CACHED = "cache-"  # results of map and filter, next to a data set in a cache of `datasets`
_LEVELS = 3  # levels of folders: CONFIG/SPLIT of the hub, CONFIG/VERSION/HASH of a cache of `datasets`
_LONG = 2000  # more rows than this should not stay in their order: training shuffles only within a window
_BATCH = 8192  # rows, read without their images


def images_in_row_file(search: Search, path: Path) -> Images:
    """The images of one file."""
    yield from images_in_row_files(search, str(path), [path])


def images_in_row_files(search: Search, place: str, files: Sequence[Path], *, whole: bool = False) -> Images:
    """The images of those `files` of the input `place` that belong to the split that the user wants.

    If `whole`, `place` must hold all files of a split.
    """
    chosen, configuration = files_of_split(search, place, [str(path) for path in files], whole=whole)
    paths = [Path(path) for path in chosen]
    yield from images_in_rows(
        search, [(str(path), ROW_KINDS[_row_kind(path)]) for path in paths], _described(paths[0], configuration)
    )


def has_rows(listing: Listing) -> bool:
    """True if a folder, or the folders in it, hold files of rows that are no tables of images."""
    if listing.paths(*PICTURES):
        return False
    below = (_first_kind(listing.folder / name, _LEVELS) for name in listing.folders)
    return "images" not in below if _row_files(listing) else "rows" in below


def images_in_folder_of_rows(search: Search, listing: Listing) -> Images:
    """The images of one split of the files of rows of a folder. No other images may lie among them."""
    files = list(_files_below(search, listing, _LEVELS))
    yield from images_in_row_files(search, str(listing.folder), files, whole=True)


def images_in_rows(search: Search, files: Sequence[tuple[str, Storage]], described: Names) -> Images:
    """The images of all rows of `files`, which have the same columns.

    `described` are class names, by column, from other files near them.
    """
    check = WnidCheck()
    rows = labelled = 0
    columns: Columns | None = None
    for path, storage in files:
        file = open_rows(path, storage)
        with damage(path):
            found = columns_of(search, file, described)
        columns = columns or found
        if (found.image, found.label) != (columns.image, columns.label):
            what = f"has its images and labels in {found.image} and {found.label}"
            other = f"{columns.image} and {columns.label} as {files[0][0]} has"
            raise DataError(f"{path}: {what}, not in {other}; pack them separately")
        meanings: Sequence[int | str] = ()
        for image in _images_of(search, file, storage, found, check):
            label = image.label
            if isinstance(label, int) and found.names is not None:
                meanings = meanings or search.meanings(found.names, path)
                label = meanings[label] if label < len(meanings) else label
            rows += 1
            labelled += label is not None
            yield image._replace(label=label)
    check.finish()
    if columns is not None and not labelled and not search.without_labels():
        why = f"no column of numbers or names besides {columns.image}"
        why = why if columns.label is None else f"{columns.label} is -1 or empty in all of them, as in a test split"
        search.note(f"{files[0][0]}: {rows} images without classes: {why}")


def _images_of(search: Search, file: RowFile, storage: Storage, columns: Columns, check: WnidCheck) -> Images:
    path_of = file.path_of(columns.image)
    asked = [name for name in (path_of, columns.label) if name]
    group = first = last = -1  # the current group of `file`, its first row, and the last block of rows within it
    for batch in _batches(file, asked):
        if batch.group != group:
            group, first, last = batch.group, batch.first, -1
        stored = file.stored(columns.image, batch)
        labels = [None] * batch.rows if columns.label is None else batch.values(columns.label)
        for row, (value, path) in enumerate(zip(labels, batch.paths(columns.image), strict=True), start=batch.first):
            place = f"{file.path}: row {row}"
            label = _label(search, value, place, columns)
            if isinstance(label, int) and path and search.options.class_names is None:
                check.see(path, label, place)
            if stored.without_bytes:
                yield _named(file.path, row, path, label, place)
                continue
            block, at = divmod(row - first, stored.together)
            if block != last:
                last, together = block, search.new_group()
            if at == _LONG:
                what = "many rows stay in their order, because that costs least to read; if they are sorted by class"
                search.note(f"{file.path}: {what}, write it again as Parquet with row_group_size=100")
            yield Found(file.path, "", label, place, row, stored.mean, storage, together)


def _batches(file: RowFile, columns: Sequence[str]) -> Iterator[Batch]:
    batches = file.batches(columns, _BATCH)
    while True:
        with damage(file.path):
            batch = next(batches, None)
        if batch is None:
            return
        if batch.rows:
            yield batch


def _label(search: Search, value: object, place: str, columns: Columns) -> Label:
    """The label in a column's value; None for -1 and an empty value."""
    if isinstance(value, float):
        value = None if math.isnan(value) else int(value) if value.is_integer() else value
    if value is None or value == -1:
        return None
    if isinstance(value, str):
        return search.label(value.strip(), place)
    if isinstance(value, int) and 0 <= value <= LARGEST_LABEL:
        return value
    what = f"{columns.label} is {value!r}, neither a class number in 0..{LARGEST_LABEL} nor a name"
    raise DataError(f"{place}: {what}; correct it, or pass another --label-column")


def _named(file: str, row: int, path: str | None, label: Label, place: str) -> Found:
    """The file that a row names in place of its image. Raises a DataError if it does not exist."""
    if path is None:
        raise DataError(f"{place}: has neither the bytes of an image nor its path; remove the row")
    there = os.path.join(os.path.dirname(file), path)
    if is_address(file) or not os.path.exists(there):
        remedy = "push_to_hub and save_to_disk embed the images"
        raise DataError(f"{file}: row {row} names {path}, which is not here, and holds no image; {remedy}")
    return Found(there, "", label, place)


# Files in folders


def _row_kind(path: Path) -> Kind:
    kind = kind_of(path)
    if kind not in ROW_KINDS:
        raise DataError(f"{path}: is no Parquet or Arrow file by its first bytes; download it again or rename it")
    return kind


def _row_files(listing: Listing) -> list[Path]:
    return [Path(path) for path in listing.paths(*_ROWS) if not path.endswith(f"/{_TABLE}")]


def _first_kind(folder: Path, levels: int) -> Literal["rows", "images"] | None:
    """The first kind found in `folder` or below it. The search stops there: a folder may hold a million images."""
    folders = []
    with data_error(f"{folder}: cannot be listed", "make it readable or move it away"), os.scandir(folder) as entries:
        for entry in entries:
            extension = "" if entry.name.startswith(".") else extension_of(entry.name)
            if extension in _ROWS and entry.name != _TABLE:
                return "rows"
            if extension in PICTURES:
                return "images"
            if entry.is_dir() and not entry.name.startswith("."):
                folders.append(entry.path)
    below = (_first_kind(Path(path), levels - 1) for path in sorted(folders) if levels > 1)
    return next(filter(None, below), None)


def _files_below(search: Search, listing: Listing, levels: int) -> Iterator[Path]:
    """The files of rows of a folder and those in it, sorted."""
    if pictures := listing.paths(*PICTURES):
        what = f"holds images, such as {pictures[0]}, near Parquet or Arrow files"
        raise DataError(f"{listing.folder}: {what}; give a folder with one kind, such as data")
    files = _row_files(listing)
    cached = [path for path in files if path.name.startswith(_CACHED)]
    if cached:
        search.note(f"{listing.folder}: ignored: {cached[0].name} and the like, results of map and filter")
    others = [name for name in listing.files if listing.folder / name not in files]
    search.ignored.update(map(extension_of, others))
    yield from (path for path in files if path not in cached)
    for name in listing.folders if levels else ():
        yield from _files_below(search, listing_of(listing.folder / name), levels - 1)


def _described(path: Path, configuration: str) -> Names:
    """The class names in files near `path`: those of `datasets`, or the README.md of a data set on the hub."""
    if names := names_of_info(path.parent / "dataset_info.json"):
        return names
    for folder in list(Path(os.path.abspath(path)).parents)[:_LEVELS]:
        card = folder / CARD
        if card.is_file():
            with data_error(
                f"{card}: cannot be read", "make it readable or move it away", (OSError, UnicodeDecodeError)
            ):
                return names_of_card(card.read_text(encoding="utf-8"), str(card), configuration)
    return {}
