"""Finds the images in a user's input, whatever form it has (`forms`), and numbers their classes.

Nothing is unpacked and no image is opened here. The order depends on names and contents alone.
"""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain, islice
from pathlib import Path

import numpy as np

from jitscale.data.find import paths_of
from jitscale.data.tar_members import described_kinds
from jitscale.errors import DataError
from jitscale.preparation.forms.arrays import has_arrays, images_in_arrays, images_in_folder_of_arrays
from jitscale.preparation.forms.cifar import has_batches, images_in_batch, images_in_folder_of_batches
from jitscale.preparation.forms.folders import has_zips, images_in_folder, images_in_folder_of_zips, images_in_zip
from jitscale.preparation.forms.hub import images_at_address, snapshot_of
from jitscale.preparation.forms.imagenet import images_in_flat_folder, is_flat_folder
from jitscale.preparation.forms.kaggle import images_in_tree, is_tree
from jitscale.preparation.forms.kinds import Kind, kind_of, refuse_unread_files
from jitscale.preparation.forms.layouts import of_one_split, splits_of_files
from jitscale.preparation.forms.listing import Listing, listing_of
from jitscale.preparation.forms.rows import (
    ROW_KINDS,
    has_rows,
    images_in_folder_of_rows,
    images_in_row_file,
    images_in_row_files,
)
from jitscale.preparation.forms.saved import images_in_saved, is_saved
from jitscale.preparation.forms.search import FORMS_REMEDY, UNREAD_PICTURES, FindOptions, Images, Search
from jitscale.preparation.forms.tables import images_in_table
from jitscale.preparation.forms.tars import has_tars, images_in_folder_of_tars, images_in_tar
from jitscale.preparation.labels import Classes, CodedLabels, find_classes, label_code
from jitscale.preparation.sources import SourcePaths, SourceTable, is_address, rows_of

# Finds the images in a file of each kind.
FILE_FORMS: dict[Kind, Callable[[Search, Path], Images]] = {
    Kind.TAR: images_in_tar,
    Kind.TABLE: images_in_table,
    Kind.NPZ: images_in_arrays,
    Kind.CIFAR: images_in_batch,
    **dict.fromkeys(ROW_KINDS, images_in_row_file),
    Kind.ZIP: images_in_zip,
}
# The form of a folder is the first one that matches; if none does, it holds images or folders of classes.
FOLDER_FORMS: list[tuple[Callable[[Listing], bool], Callable[[Search, Listing], Images]]] = [
    (is_tree, images_in_tree),
    (has_tars, images_in_folder_of_tars),
    (has_arrays, images_in_folder_of_arrays),
    (has_batches, images_in_folder_of_batches),
    (is_flat_folder, images_in_flat_folder),
    (is_saved, images_in_saved),
    (has_rows, images_in_folder_of_rows),
    (has_zips, images_in_folder_of_zips),
]

_CHUNK = 1000  # images between two reports
_SKIPPED_SHOWN = 5  # folders

OnFound = Callable[[int], object]


def find_sources(
    inputs: Sequence[str], options: FindOptions | None = None, on_found: OnFound = lambda count: None
) -> SourceTable:
    """Find all images of `inputs`.

    The form of an input is recognised by its content; docs/data.md lists the forms. Hidden files are ignored. A label
    means the same class in all inputs.

    The user or the inputs may give class names. They name labels that are numbers, and number labels that are names.
    Without them, names are numbered in sorted order; if all names are numbers, they are sorted by value. `on_found` is
    called now and then with a number of images. Raises a DataError if an input is missing, damaged or of no known form,
    holds no images, or its labels make no sense.
    """
    _refuse_twice(inputs)
    search, paths = Search(options or FindOptions()), SourcePaths()
    images = chain.from_iterable(_images_of(search, name) for name in inputs)
    names: dict[str, int] = {}
    places: dict[int, str] = {}  # key: label code; value: the place of the first label with it
    chunks = []
    while chunk := list(islice(images, _CHUNK)):
        rows = []
        for image in chunk:
            code = label_code(image.label, names)
            places.setdefault(code, image.place)
            extension = image.extension.encode()
            number = paths.number(image.path)
            rows.append((number, image.offset, image.size, code, extension, image.storage, image.group))
        chunks.append(rows_of(rows))
        on_found(len(chunk))
    unread = Counter({kind: count for kind, count in search.ignored.items() if kind in UNREAD_PICTURES})
    if not chunks:
        if unread:
            what = f"no image of a kind that is read, but {described_kinds(unread)}"
            raise DataError(f"{', '.join(inputs)}: {what}; convert these images to .png")
        for folder in filter(Path.is_dir, map(Path, inputs)):
            refuse_unread_files(folder)
        instead = f", but {described_kinds(search.ignored)}" if search.ignored else ""
        where = "it" if len(inputs) == 1 else "them"
        raise DataError(f"{', '.join(inputs)}: no image in {where}{instead}; {FORMS_REMEDY}")
    search.refuse_unused(", ".join(inputs))
    table = np.concatenate(chunks)
    labels = CodedLabels(table["label"].copy(), list(names))
    class_names = search.names if search.options.class_names is None else search.options.class_names
    classes = find_classes([labels], class_names)
    _refuse_wrong(labels, classes, places)
    table["label"] = labels.numbers(classes)
    if class_names is None:
        _say_numbered(search, classes.names or [])
    _say_passed_over(search, unread)
    return SourceTable(table, *paths.arrays(), classes.number, classes.names, search.ignored, search.notes)


def _refuse_wrong(labels: CodedLabels, classes: Classes, places: dict[int, str]) -> None:
    """Refuse labels of several kinds, and unknown classes. `places` are those of the first label with each code."""
    usual = labels.kinds() == classes.kind
    for row, what, remedy in labels.wrong(classes):
        place = places[int(labels.codes[row])]
        if not usual.any():
            raise DataError(f"{place}: has no label, but class names are given; leave out the names, or give labels")
        like = "" if usual[row] else f", as in {places[int(labels.codes[usual][0])]}"
        raise DataError(f"{place}: {what}{like}; {remedy}")


def _say_numbered(search: Search, names: list[str]) -> None:
    """If all class names are numbers, note which class each becomes: the name may differ from the class number."""
    if names and all(name.isascii() and name.isdigit() for name in names):
        if [int(name) for name in names] == list(range(len(names))):
            search.note(f"the classes are called 0 to {len(names) - 1}, and each has that number")
        else:
            order = f"class 0 is {names[0]}, class {len(names) - 1} is {names[-1]}"
            what = "the names of the classes are numbers, but not 0, 1, 2, ..."
            search.note(f"warning: {what}: {order}; if these are labels, pass all classes by --class-names")


def _say_passed_over(search: Search, unread: Counter[str]) -> None:
    """Note the kinds of images that are not read, and the folders that are no classes."""
    if unread:
        search.note(f"not read: {described_kinds(unread)}; convert these images to .png to use them")
    if skipped := search.skipped:
        more = f" and {len(skipped) - _SKIPPED_SHOWN} more" if len(skipped) > _SKIPPED_SHOWN else ""
        search.note(f"skipped: {', '.join(skipped[:_SKIPPED_SHOWN])}{more}")


def _refuse_twice(paths: Sequence[str]) -> None:
    first: dict[str, str] = {}
    for path in paths:
        real = path.rstrip("/") if is_address(path) else os.path.realpath(path)
        if real in first:
            raise DataError(f"{path}: is given twice (also as {first[real]}); every image must come once, remove one")
        first[real] = path


def _images_of(search: Search, name: str) -> Images:
    """All images of the input `name`. Raises as `find_sources` does."""
    path = Path(name)
    if is_address(name):
        yield from images_at_address(search, name)
    elif path.is_dir():
        yield from _images_in_folder(search, listing_of(snapshot_of(path)))
    elif path.exists():
        yield from _images_in_file(search, path)
    else:
        yield from _images_in_files(search, name, _files_of(name))


def _images_in_files(search: Search, pattern: str, files: Sequence[Path]) -> Images:
    """The images of the files of a pattern; if the user names a split, only its images."""
    rows = [file for file in files if kind_of(file) in ROW_KINDS]
    if rows and len(rows) < len(files):
        raise DataError(f"{pattern}: names Parquet or Arrow files ({len(rows)}) and others; keep one kind in a pattern")
    if rows:
        yield from images_in_row_files(search, pattern, rows)
        return
    paths = [str(file) for file in files]
    splits = sorted(splits_of_files([file.name for file in files]).values())
    if len(splits) > 1 and search.options.split is None:
        what = f"names the files of several splits ({' and '.join(splits)}), which become one set"
        search.note(f"warning: {pattern}: {what}; pass --split train for one")
    else:
        paths = of_one_split(search, pattern, paths)
    for path in paths:
        yield from _images_in_file(search, Path(path))


def _images_in_file(search: Search, path: Path) -> Images:
    yield from FILE_FORMS[kind_of(path)](search, path)


def _images_in_folder(search: Search, listing: Listing) -> Images:
    for is_form, images in FOLDER_FORMS:
        if is_form(listing):
            yield from images(search, listing)
            return
    yield from images_in_folder(search, listing)


def _files_of(pattern: str) -> list[Path]:
    """The files of a glob or brace pattern."""
    paths = paths_of(pattern)
    if paths == [Path(pattern)] and not paths[0].exists():
        raise DataError(f"{pattern}: there is no such file or folder; {FORMS_REMEDY}")
    if not paths:
        raise DataError(f"{pattern}: matches no file; {FORMS_REMEDY}")
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path}: there is no such file; correct the pattern")
    _refuse_twice([str(path) for path in paths])
    return paths
