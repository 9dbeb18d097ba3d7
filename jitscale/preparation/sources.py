"""Finds the images in a user's input: folders of classes, tars of tars, webdataset tars, tables of paths.

Nothing is unpacked and no image is opened here. The order depends on names and contents alone.
"""

from __future__ import annotations

import csv
import json
import os
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

import numpy as np
import numpy.typing as npt

from jitscale.data.find import paths_of
from jitscale.data.images import EXTENSIONS
from jitscale.data.tar_index import LARGEST_LABEL, sound_scan
from jitscale.data.tar_members import LOST_LINK, described_kinds, is_hidden
from jitscale.errors import DataError, data_error
from jitscale.preparation.labels import Classes, CodedLabels, find_classes, label_code, parse_label
from jitscale.preparation.layouts import refuse_label_file, refuse_splits, refuse_tars_of_splits, say_if_one_class
from jitscale.preparation.tars_of_tars import is_tar_of_tars, members_within

PICTURES = ("jpg", "jpeg", "png", "webp")  # in folders and in tars of tars
WHOLE_FILE = -1  # as a size

# 28 bytes an image: 100 million of them in webdataset tars take 2.8 GB.
_SOURCE = np.dtype([("path", "<i4"), ("offset", "<i8"), ("size", "<i8"), ("label", "<i4"), ("extension", "S4")])
_CHUNK = 1000  # images between two reports
_REMEDY = "give a folder of images, tars or a pattern of them, or a .csv or .jsonl with paths"

OnFound = Callable[[int], object]
_Row = tuple[int, object, object]  # of a table: line, path, label


@dataclass(frozen=True)
class Source:
    """Where the bytes of one image lie."""

    path: str
    offset: int
    size: int  # bytes; WHOLE_FILE: the file is the image
    extension: str  # one of EXTENSIONS, as the name has it
    label: int  # NO_LABEL without one

    @property
    def place(self) -> str:
        """What tells a user where that is, in one line of printable text."""
        text = os.fsencode(self.path).decode("utf-8", "backslashreplace")
        plain = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
        return plain if self.size == WHOLE_FILE else f"{plain}: byte {self.offset}"


@dataclass(frozen=True)
class SourceTable:
    """All images of an input, numbered from 0, in a few arrays."""

    table: npt.NDArray[np.void]  # (images,) _SOURCE
    paths: npt.NDArray[np.uint8]  # all paths, end to end
    path_ends: npt.NDArray[np.int64]  # (paths,)
    num_classes: int  # labels are below it; 0: there are none
    class_names: list[str] | None  # None if labels are numbers without names, or there are none
    ignored: Counter[str]  # files that were no images, by extension

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, number: int) -> Source:
        path, offset, size, label, extension = self.table[number].item()
        start = self.path_ends[path - 1] if path else 0
        name = os.fsdecode(self.paths[start : self.path_ends[path]].tobytes())
        return Source(name, offset, size, extension.decode(), label)

    def write(self, file: IO[bytes]) -> None:
        """Write the arrays; equal tables give equal bytes. The classes and the ignored files are not among them."""
        np.savez(file, table=self.table, paths=self.paths, path_ends=self.path_ends)

    @classmethod
    def read(cls, path: Path, num_classes: int, class_names: list[str] | None) -> SourceTable:
        """What `write` wrote to the file `path`. Raises an OSError, ValueError or KeyError if that is not there."""
        with np.load(path, allow_pickle=False) as arrays:
            table, paths, ends = arrays["table"], arrays["paths"], arrays["path_ends"]
        if table.dtype != _SOURCE:
            raise ValueError(f"holds {table.dtype}")
        return cls(table, paths, ends, num_classes, class_names, Counter())


def find_sources(
    inputs: Sequence[str], class_names: list[str] | None = None, on_found: OnFound = lambda count: None
) -> SourceTable:
    """Find all images of `inputs`.

    An input is recognised by what it is: a folder with a folder for each class, or with images and no classes; a tar
    of tars, one for each class, as ImageNet is published; webdataset tars, as a file, a glob, a brace pattern or a
    folder; a .csv or .jsonl with `path` and maybe `label`, where paths are relative to its folder. Hidden files are
    passed over. A folder with a file of labels, or with the splits of a data set, is refused. The labels of all inputs
    mean the same.

    `class_names` give names to labels that are numbers, and numbers to labels that are names; without them names are
    numbered in sorted order, and by number if all are numbers. `on_found` is called with a number of images, now and
    then. Raises a DataError if an input is missing, damaged or none of these, holds no images, or its labels make no
    sense.
    """
    _refuse_twice([Path(name) for name in inputs])
    finder = _Finder(class_names or [])
    images = chain.from_iterable(map(finder.images, inputs))
    paths, path_ends, last_path = bytearray(), array("q"), None
    names: dict[str, int] = {}
    places: dict[int, str] = {}  # of the first label with each code
    chunks = []
    while chunk := list(islice(images, _CHUNK)):
        rows = []
        for image in chunk:
            if image.path != last_path:
                paths += os.fsencode(image.path)
                path_ends.append(len(paths))
                last_path = image.path
            code = label_code(image.label, names)
            places.setdefault(code, image.place)
            rows.append((len(path_ends) - 1, image.offset, image.size, code, image.extension.encode()))
        chunks.append(np.array(rows, _SOURCE))
        on_found(len(chunk))
    if not chunks:
        instead = f", but {described_kinds(finder.ignored)}" if finder.ignored else ""
        raise DataError(f"{', '.join(inputs)}: no image in {'it' if len(inputs) == 1 else 'them'}{instead}; {_REMEDY}")
    table = np.concatenate(chunks)
    labels = CodedLabels(table["label"].copy(), list(names))
    classes = find_classes([labels], class_names)
    _refuse_wrong(labels, classes, places)
    table["label"] = labels.numbers(classes)
    path_bytes, ends = np.frombuffer(bytes(paths), np.uint8), np.array(path_ends, np.int64)
    return SourceTable(table, path_bytes, ends, classes.number, classes.names, finder.ignored)


def _refuse_wrong(labels: CodedLabels, classes: Classes, places: dict[int, str]) -> None:
    """Refuse labels of several kinds, and unknown classes; `places` are those of the first label with each code."""
    usual = labels.kinds() == classes.kind
    for row, what, remedy in labels.wrong(classes):
        place = places[int(labels.codes[row])]
        if not usual.any():
            raise DataError(f"{place}: has no label, but class names are given; leave them away, or give labels")
        like = "" if usual[row] else f", as in {places[int(labels.codes[usual][0])]}"
        raise DataError(f"{place}: {what}{like}; {remedy}")


class _Found(NamedTuple):
    """One image that was found."""

    path: str  # of the file that it is, or lies in
    extension: str  # one of EXTENSIONS
    label: int | str | None  # a class number, a class name, or none
    place: str  # of the label, for a message
    offset: int = 0
    size: int = WHOLE_FILE


def _refuse_twice(paths: list[Path]) -> None:
    first: dict[str, Path] = {}
    for path in paths:
        if (other := first.setdefault(os.path.realpath(path), path)) is not path:
            raise DataError(f"{path}: is given twice (as {other} too); every image must come once, remove one")


class _Finder:
    """Recognises inputs, and yields the images in each."""

    def __init__(self, class_names: Sequence[str]) -> None:
        self.ignored: Counter[str] = Counter()  # files that are no images, by extension
        self._known = set(class_names)

    def images(self, name: str) -> Iterator[_Found]:
        """All images of the input `name`; refuses it as `find_sources` says."""
        path = Path(name)
        suffix = path.suffix.lower()
        if path.is_dir():
            yield from self._in_folder(path)
        elif not path.exists():
            for tar in _tars_of(name):
                yield from self._in_tar(tar)
        elif suffix == ".csv":
            yield from self._in_table(path, "CSV", _csv_rows)
        elif suffix == ".jsonl":
            yield from self._in_table(path, "JSON lines", _json_rows)
        elif suffix == ".tar":
            yield from self._in_tar(path)
        else:
            packed = suffix in (".gz", ".tgz", ".xz", ".bz2", ".zst", ".zip")
            remedy = "unpack it into a plain .tar, which is read by offset" if packed else _REMEDY
            raise DataError(f"{name}: is neither a folder, a .tar, a .csv nor a .jsonl; {remedy}")

    def _in_folder(self, folder: Path) -> Iterator[_Found]:
        entries = _entries(str(folder))
        files = [(_extension(entry.name), entry.path) for entry in entries if not _is_folder(entry)]
        pictures = [(extension, path) for extension, path in files if extension in PICTURES]
        tars = [path for extension, path in files if extension == "tar"]
        others = [(extension, path) for extension, path in files if extension not in (*PICTURES, "tar")]
        self.ignored.update(extension for extension, _ in others)
        without_class = [path for _, path in pictures]
        for _, path in others if not tars else ():
            refuse_label_file(path, without_class)
        classes = set()
        for entry in entries:
            for path, extension in self._pictures_below(entry.path) if _is_folder(entry) else ():
                classes.add(entry.name)
                yield _Found(path, extension, entry.name, path)
        kinds = {"folders of classes": classes, "images without a class": pictures, "tars": tars}
        present = [f"{kind} ({len(found)})" for kind, found in kinds.items() if found]
        if len(present) > 1:
            raise DataError(f"{folder}: holds {' and '.join(present)}; keep one kind in a folder")
        refuse_splits(folder, classes, self._known, [entry.name for entry in entries if _is_folder(entry)])
        say_if_one_class(folder, classes, self._known)
        refuse_tars_of_splits(folder, tars)
        if not present:
            raise DataError(f"{folder}: holds neither images ({', '.join(PICTURES)}) nor tars; {_REMEDY}")
        for extension, path in pictures:
            yield _Found(path, extension, None, path)
        for path in tars:
            yield from self._in_tar(Path(path))

    def _pictures_below(self, folder: str, above: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
        """Paths and extensions of the images in `folder` and the folders in it; `above` are those that led here."""
        here = os.path.realpath(folder)
        for entry in _entries(folder):
            if _is_folder(entry):
                real = os.path.realpath(entry.path)
                if entry.is_symlink() and ((here + "/").startswith(real + "/") or real in above):
                    raise DataError(f"{entry.path}: is a link to a folder that holds it, without end; remove it")
                yield from self._pictures_below(entry.path, (*above, here))
            elif (extension := _extension(entry.name)) in PICTURES:
                yield entry.path, extension  # packing lists it as a bad input if it cannot be read
            else:
                refuse_label_file(entry.path)
                self.ignored[extension] += 1

    def _in_tar(self, path: Path) -> Iterator[_Found]:
        if is_tar_of_tars(path):
            yield from self._in_tar_of_tars(path)
            return
        scan = sound_scan(path)
        if scan.unread_labels:
            raise DataError(f"{path}: {scan.unread_labels}")
        self.ignored.update(scan.skipped)
        for sample in scan.samples:
            place = f"{path}: byte {sample.offset if sample.label is None else sample.label_offset}"
            label = self._label(sample.label, place)
            yield _Found(str(path), sample.extension, label, place, sample.offset, sample.size)

    def _in_tar_of_tars(self, path: Path) -> Iterator[_Found]:
        """Classes and images in the order of their names, as they would be found in folders."""
        with path.open("rb") as file:
            inner = []
            for member, content in members_within(file, path, 0, os.fstat(file.fileno()).st_size):
                if content is None:
                    self.ignored[_extension(member.name) + LOST_LINK] += 1
                    continue
                if _extension(member.name) != "tar":
                    what = f"byte {member.offset}: {member.name!r} is no tar, but others in it are"
                    raise DataError(f"{path}: {what}; a tar of tars holds one .tar a class and nothing else")
                inner.append((PurePosixPath(member.name).stem, content.offset_data, content.size))
            refuse_splits(path, {label for label, _, _ in inner}, self._known)
            for label, start, length in sorted(inner):
                pictures = []
                for member, content in members_within(file, path, start, length):
                    extension = _extension(member.name)
                    if content is None:
                        self.ignored[extension + LOST_LINK] += 1
                    elif extension in PICTURES and not is_hidden(member.name):
                        pictures.append((member.name, content.offset_data, content.size, extension))
                    else:
                        self.ignored[extension] += 1
                for _, offset, size, extension in sorted(pictures):
                    yield _Found(str(path), extension, label, f"{path}: byte {offset}", offset, size)

    def _in_table(self, table: Path, form: str, rows: Callable[[IO[str], str], Iterator[_Row]]) -> Iterator[_Found]:
        empty = True
        what, damage = f"{table}: cannot be read as a table", (OSError, UnicodeDecodeError, csv.Error)
        with (
            data_error(what, f"write it as {form} in UTF-8", damage),
            table.open(encoding="utf-8-sig", newline="") as file,
        ):
            for line, path, label in rows(file, f"{table}: line"):
                empty = False
                yield self._in_row(table, f"{table}: line {line}", path, label)
        if empty:
            raise DataError(f"{table}: has no lines with images; give a path in every line")

    def _in_row(self, table: Path, place: str, path: object, label: object) -> _Found:
        if not isinstance(path, str) or not path:
            raise DataError(f"{place}: has no path; give every line the path of an image")
        if _extension(path) not in EXTENSIONS:
            raise DataError(f"{place}: {path!r} is no image by its name; expected {', '.join(EXTENSIONS)}")
        if label is not None and (isinstance(label, bool) or not isinstance(label, (str, int))):
            raise DataError(f"{place}: label {label!r} is neither an integer nor a name; correct it")
        text = None if label is None else str(label).strip()
        return _Found(os.path.join(table.parent, path), _extension(path), self._label(text, place), place)

    def _label(self, text: str | None, place: str) -> int | str | None:
        """The label that `text` is; refuses an empty one, and a number that no class can have."""
        label = parse_label(text)
        if label is None and text is not None and text not in self._known:
            number = f"a class number, an integer in 0..{LARGEST_LABEL}"
            raise DataError(f"{place}: label {text!r} is neither {number}, nor a name; correct it")
        return text if label is None else label


def _tars_of(pattern: str) -> list[Path]:
    """The files of a glob or brace pattern."""
    paths = paths_of(pattern)
    if paths == [Path(pattern)] and not paths[0].exists():
        raise DataError(f"{pattern}: there is no such file or folder; {_REMEDY}")
    if not paths:
        raise DataError(f"{pattern}: matches no file; {_REMEDY}")
    for path in paths:
        if path.suffix.lower() != ".tar" or not path.is_file():
            what = "is no .tar" if path.is_file() else "there is no such file"
            raise DataError(f"{path}: {what}, a pattern names tars only; correct the pattern")
    _refuse_twice(paths)
    return paths


def _is_folder(entry: os.DirEntry[str]) -> bool:
    with data_error(f"{entry.path}: cannot be looked at", "remove it or correct it"):
        return entry.is_dir()


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """What is in `folder`, sorted by name, without hidden files."""
    with data_error(f"{folder}: cannot be listed", "make it readable or move it away"), os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)


def _extension(name: str) -> str:
    """`a.b.JPEG` -> `jpeg`."""
    return PurePosixPath(name).suffix[1:].lower()


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
