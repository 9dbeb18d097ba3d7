"""Which images there are in what a user has: folders of classes, tars of tars, webdataset tars, tables of paths.

Nothing is unpacked and no image is opened here. The order depends on names and contents alone.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import tarfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, cast

import numpy as np
import numpy.typing as npt

from jitscale.data.find import paths_of
from jitscale.data.images import EXTENSIONS
from jitscale.data.tar_index import LARGEST_LABEL, NO_LABEL, class_number, scan_tar, wrong_end
from jitscale.errors import DataError

PICTURES = ("jpg", "jpeg", "png", "webp")  # in folders and in tars of tars
WHOLE_FILE = -1  # as a size

# 28 bytes an image: 100 million of them in webdataset tars take 2.8 GB.
_INPUT = np.dtype([("path", "<i4"), ("offset", "<i8"), ("size", "<i8"), ("label", "<i4"), ("extension", "S4")])
_LIKE_A_NUMBER = re.compile(r"[+-]?\d+([.,]\d*)?([eE][+-]?\d+)?")
_REPORT_EVERY = 1000  # images
_REMEDY = "give a folder of images, tars or a pattern of them, or a .csv or .jsonl with paths"

OnFound = Callable[[int], object]


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
class Inputs:
    """All images of an input, numbered from 0, in a few arrays.

    Attributes:
        num_classes: labels are below it; 0: there are none.
        class_names: of the labels; None where labels are numbers without names, or there are none.
        ignored: how many files were passed over, by extension.
    """

    table: npt.NDArray[np.void]  # (images,) _INPUT
    paths: npt.NDArray[np.uint8]  # all paths, end to end
    path_ends: npt.NDArray[np.int64]  # (paths,)
    num_classes: int
    class_names: list[str] | None
    ignored: Counter[str]

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, number: int) -> Source:
        path, offset, size, label, extension = self.table[number].item()
        return Source(self._path(path), offset, size, extension.decode(), label)

    def _path(self, number: int) -> str:
        start = self.path_ends[number - 1] if number else 0
        return os.fsdecode(self.paths[start : self.path_ends[number]].tobytes())

    def write(self, file: IO[bytes]) -> None:
        """Write the arrays; equal inputs give equal bytes. The classes and the ignored files are not among them."""
        np.savez(file, table=self.table, paths=self.paths, path_ends=self.path_ends)

    @classmethod
    def read(cls, path: Path, num_classes: int, class_names: list[str] | None) -> Inputs:
        """What `write` wrote to the file `path`.

        Raises:
            OSError, ValueError, KeyError: it is not there, or something else.
        """
        with np.load(path, allow_pickle=False) as arrays:
            table, paths, ends = arrays["table"], arrays["paths"], arrays["path_ends"]
        if table.dtype != _INPUT:
            raise ValueError(f"holds {table.dtype}")
        return cls(table, paths, ends, num_classes, class_names, Counter())


def find_inputs(
    sources: Sequence[str], class_names: list[str] | None = None, on_found: OnFound = lambda count: None
) -> Inputs:
    """Find all images of `sources`.

    A source is recognised by what it is: a folder with a folder for each class, or with images and no classes; a tar
    of tars, one for each class, as ImageNet is published; webdataset tars, as a file, a glob, a brace pattern or a
    folder; a .csv or .jsonl with `path` and maybe `label`, where paths are relative to its folder. Hidden files are
    passed over.

    Args:
        sources: one or several, whose labels mean the same.
        class_names: gives names to labels that are numbers, and numbers to labels that are names; without it names
            are numbered in sorted order.
        on_found: called with a number of images, now and then.

    Raises:
        DataError: a source is missing, damaged or none of these, holds no images, or its labels make no sense.
    """
    found = _Collector(on_found)
    _refuse_twice([Path(source) for source in sources])
    for source in sources:
        _add(found, source)
    inputs = found.inputs(class_names)
    if len(inputs) == 0:
        raise DataError(f"{', '.join(sources)}: no image in {'it' if len(sources) == 1 else 'them'}; {_REMEDY}")
    return inputs


class _Collector:
    """The images found so far, and for every label where it was met first."""

    def __init__(self, on_found: OnFound) -> None:
        self.ignored: Counter[str] = Counter()
        self._on_found = on_found
        self._paths = bytearray()
        self._path_ends = array("q")
        self._path_numbers, self._offsets, self._sizes = array("i"), array("q"), array("q")
        self._labels, self._extensions = array("i"), array("b")
        self._met: dict[tuple[str, bool], tuple[int, str]] = {}  # label text, is it a name: its number here, the place
        self._unlabelled: str | None = None  # the first place without a label
        self._last_path: str | None = None

    def __len__(self) -> int:
        return len(self._offsets)

    def add(
        self,
        path: str,
        extension: str,
        label: str | None,
        *,
        place: str,
        offset: int = 0,
        size: int = WHOLE_FILE,
        is_name: bool = False,
    ) -> None:
        """Add one image.

        Args:
            path: of the file that it is, or lies in.
            extension: one of `EXTENSIONS`.
            label: its text; None for no label.
            place: of the label, for a message.
            offset: in bytes, where `size` is one.
            size: in bytes, or `WHOLE_FILE`.
            is_name: the label is a name even if it looks like a number.
        """
        if path != self._last_path:
            self._paths += os.fsencode(path)
            self._path_ends.append(len(self._paths))
            self._last_path = path
        if label is None:
            number = NO_LABEL
            self._unlabelled = self._unlabelled or place
        else:
            number, _ = self._met.setdefault((label, is_name), (len(self._met), place))
        self._path_numbers.append(len(self._path_ends) - 1)
        self._offsets.append(offset)
        self._sizes.append(size)
        self._labels.append(number)
        self._extensions.append(EXTENSIONS.index(extension))
        if len(self) % _REPORT_EVERY == 0:
            self._on_found(_REPORT_EVERY)

    def inputs(self, class_names: list[str] | None) -> Inputs:
        """All of them, with numbers for labels.

        Raises:
            DataError: some have labels and some have none, or a label makes no sense.
        """
        final, num_classes, names = self._final_labels(class_names)
        table = np.empty(len(self), _INPUT)
        table["path"], table["offset"], table["size"] = self._path_numbers, self._offsets, self._sizes
        table["label"] = np.array([*final, NO_LABEL], np.int32)[np.asarray(self._labels)]  # NO_LABEL is the last one
        table["extension"] = np.array(EXTENSIONS, "S4")[np.asarray(self._extensions)]
        paths, ends = np.frombuffer(bytes(self._paths), np.uint8), np.array(self._path_ends, np.int64)
        return Inputs(table, paths, ends, num_classes, names, self.ignored)

    def _final_labels(self, class_names: list[str] | None) -> tuple[list[int], int, list[str] | None]:
        """The label of each number given by `add`, the number of classes, and their names."""
        if not self._met:
            if class_names is not None and len(self):
                raise DataError(
                    f"{self._unlabelled}: has no label, but class names are given; leave the names away, or give labels"
                )
            return [], 0, None
        if self._unlabelled is not None:
            labelled = next(iter(self._met.values()))[1]
            raise DataError(
                f"{self._unlabelled}: has no label, but {labelled} has one; give a label to all images or to none"
            )
        known = set(class_names or [])
        numbers = {key: None if key[1] else _number(key[0], place, known) for key, (_, place) in self._met.items()}
        first = next(iter(self._met))
        for key, (_, place) in self._met.items():
            if (numbers[key] is None) != (numbers[first] is None):
                kind, other = ("number", "name") if numbers[first] is None else ("name", "number")
                raise DataError(
                    f"{place}: label {key[0]!r} is a {kind}, but {self._met[first][1]}: label {first[0]!r} is a "
                    f"{other}; give all labels as numbers or all as names"
                )
        if numbers[first] is None:
            names = sorted({text for text, _ in self._met}) if class_names is None else class_names
            position = {name: number for number, name in enumerate(names)}
            final = [position.get(text) for text, _ in self._met]
            num_classes = len(names)
        else:
            final = list(numbers.values())
            num_classes = max(number or 0 for number in final) + 1 if class_names is None else len(class_names)
        for (text, _), (_, place), number in zip(self._met, self._met.values(), final, strict=True):
            if number is None or number >= num_classes:
                raise DataError(
                    f"{place}: label {text!r} is not among the {num_classes} class names; correct it or the names"
                )
        return cast("list[int]", final), num_classes, class_names if numbers[first] is not None else names


def _number(text: str, place: str, known: set[str]) -> int | None:
    """The class number that `text` is, or None for a name.

    Raises:
        DataError: it is empty, or a number that no class can have.
    """
    number = class_number(text, {})
    if number is None and text not in known and (not text or _LIKE_A_NUMBER.fullmatch(text)):
        raise DataError(
            f"{place}: label {text!r} is neither a class number, an integer in 0..{LARGEST_LABEL}, nor a name; "
            "correct it"
        )
    return number


def _add(found: _Collector, source: str) -> None:
    path = Path(source)
    suffix = path.suffix.lower()
    if path.is_dir():
        _add_folder(found, path)
    elif path.exists() and suffix == ".csv":
        _add_rows(found, path, _csv_rows(path))
    elif path.exists() and suffix == ".jsonl":
        _add_rows(found, path, _json_rows(path))
    elif path.exists() and suffix == ".tar":
        _add_tar(found, path)
    elif path.exists():
        packed = suffix in (".gz", ".tgz", ".xz", ".bz2", ".zst", ".zip")
        remedy = "unpack it into a plain .tar, which is read by offset" if packed else _REMEDY
        raise DataError(f"{source}: is neither a folder, a .tar, a .csv nor a .jsonl; {remedy}")
    else:
        for tar in _tars_of(source):
            _add_tar(found, tar)


def _refuse_twice(paths: list[Path]) -> None:
    first: dict[str, Path] = {}
    for path in paths:
        if (other := first.setdefault(os.path.realpath(path), path)) is not path:
            raise DataError(f"{path}: is given twice (as {other} too); every image must come once, remove one")


def _tars_of(pattern: str) -> list[Path]:
    """The files of a glob or brace pattern."""
    paths = paths_of(pattern)
    if paths == [Path(pattern)] and not paths[0].exists():
        raise DataError(f"{pattern}: there is no such file or folder; {_REMEDY}")
    if not paths:
        raise DataError(f"{pattern}: matches no file; {_REMEDY}")
    for path in paths:
        if path.suffix.lower() != ".tar" or not path.is_file():
            raise DataError(
                f"{path}: {'is no .tar' if path.is_file() else 'there is no such file'}, a pattern names tars only; "
                "correct the pattern"
            )
    _refuse_twice(paths)
    return paths


# Folders


def _add_folder(found: _Collector, folder: Path) -> None:
    entries = _entries(str(folder))
    pictures = [entry for entry in entries if not entry.is_dir() and _extension(entry.name) in PICTURES]
    tars = [entry for entry in entries if not entry.is_dir() and _extension(entry.name) == "tar"]
    for entry in entries:
        if not entry.is_dir() and _extension(entry.name) not in (*PICTURES, "tar"):
            found.ignored[_extension(entry.name)] += 1
    before = len(found)
    classes = 0
    for entry in entries:
        if entry.is_dir():
            start = len(found)
            for path, extension in _pictures_below(found, entry.path):
                found.add(path, extension, entry.name, place=path, is_name=True)
            classes += len(found) > start
    for entry in pictures:
        found.add(entry.path, _extension(entry.name), None, place=entry.path)
    kinds = {
        f"folders of classes ({classes})": classes,
        f"images without a class ({len(pictures)})": len(pictures),
        f"tars ({len(tars)})": len(tars),
    }
    present = [kind for kind, count in kinds.items() if count]
    if len(present) > 1:
        raise DataError(f"{folder}: holds {' and '.join(present)}; keep one kind in a folder")
    for entry in tars:
        _add_tar(found, Path(entry.path))
    if len(found) == before and not tars:
        raise DataError(f"{folder}: holds neither images ({', '.join(PICTURES)}) nor tars; {_REMEDY}")


def _pictures_below(found: _Collector, folder: str, above: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Paths and extensions of the images in `folder` and the folders in it; `above` are those that led here."""
    here = os.path.realpath(folder)
    for entry in _entries(folder):
        if _is_folder(entry):
            real = os.path.realpath(entry.path)
            if entry.is_symlink() and ((here + "/").startswith(real + "/") or real in above):
                raise DataError(f"{entry.path}: is a link to a folder that holds it, which has no end; remove the link")
            yield from _pictures_below(found, entry.path, (*above, here))
        elif (extension := _extension(entry.name)) in PICTURES:
            yield entry.path, extension  # whether it can be read is seen when it is read, and listed then
        else:
            found.ignored[extension] += 1


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        raise DataError(f"{entry.path}: cannot be looked at ({error.strerror}); remove it or correct it") from error


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """What is in `folder`, sorted by name, without hidden files."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror}); make it readable or move it away") from error


def _extension(name: str) -> str:
    """`a.b.JPEG` -> `jpeg`."""
    return PurePosixPath(name).suffix[1:].lower()


# Tars


def _add_tar(found: _Collector, path: Path) -> None:
    if _is_tar_of_tars(path):
        _add_tar_of_tars(found, path)
        return
    for sample in scan_tar(path):
        place = f"{path}: byte {sample.offset if sample.label is None else sample.label_offset}"
        found.add(str(path), sample.extension, sample.label, place=place, offset=sample.offset, size=sample.size)


def _is_tar_of_tars(path: Path) -> bool:
    """Whether the first file in it is a tar. A damaged one is not: reading it as webdataset's says what is wrong."""
    try:
        with tarfile.open(path, "r:") as tar:
            return next((_extension(member.name) == "tar" for member in tar if member.isreg()), False)
    except (OSError, tarfile.TarError, ValueError):
        return False


def _add_tar_of_tars(found: _Collector, path: Path) -> None:
    """Classes and images in the order of their names, as they would be found in folders."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        inner = []
        for member in _members(file, path, 0, size):
            if _extension(member.name) != "tar":
                raise DataError(
                    f"{path}: byte {member.offset}: {member.name!r} is no tar, but others in it are; "
                    "a tar of tars holds one .tar for each class and nothing else"
                )
            inner.append((PurePosixPath(member.name).stem, member.offset_data, member.size))
        for label, start, length in sorted(inner):
            members = []
            for member in _members(file, path, start, length):
                extension = _extension(member.name)
                if extension in PICTURES and not PurePosixPath(member.name).name.startswith("."):
                    members.append((member.name, start + member.offset_data, member.size, extension))
                else:
                    found.ignored[extension] += 1
            for _, offset, bytes_, extension in sorted(members):
                place = f"{path}: byte {offset}"
                found.add(str(path), extension, label, place=place, offset=offset, size=bytes_, is_name=True)


def _members(file: IO[bytes], path: Path, start: int, size: int) -> Iterator[tarfile.TarInfo]:
    """The regular members of the tar in bytes [start, start + size) of `file`; their offsets count from `start`.

    Raises:
        DataError: it is damaged or cut.
    """
    try:
        with tarfile.open(fileobj=cast(IO[bytes], _Window(file.fileno(), start, size)), mode="r:") as tar:
            for member in tar:
                if member.isreg():
                    yield member
            broken = wrong_end(path, file, start + tar.offset, start + size)
            if broken is not None:
                raise DataError(str(broken))
    except DataError:
        raise
    except (tarfile.TarError, ValueError) as error:  # ValueError: numbers in pax headers
        raise DataError(
            f"{path}: bytes {start}..{start + size}: no whole tar ({error}); copy it again and compare its checksum"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}); start again when the storage works") from error


class _Window(io.RawIOBase):
    """A part of a file, as a file: a tar in a tar can then not be read past its end."""

    def __init__(self, descriptor: int, start: int, size: int) -> None:
        self._descriptor, self._start, self._size = descriptor, start, size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(self._size - self._position, 0)
        data = os.pread(self._descriptor, left if size < 0 else min(size, left), self._start + self._position)
        self._position += len(data)
        return data


# Tables

_Row = tuple[int, object, object]  # line, path, label


def _add_rows(found: _Collector, table: Path, rows: Iterator[_Row]) -> None:
    before = len(found)
    for line, path, label in rows:
        place = f"{table}: line {line}"
        if not isinstance(path, str) or not path:
            raise DataError(f"{place}: has no path; give every line the path of an image")
        if _extension(path) not in EXTENSIONS:
            raise DataError(f"{place}: {path!r} is no image by its name; expected {', '.join(EXTENSIONS)}")
        if label is not None and (isinstance(label, bool) or not isinstance(label, (str, int))):
            raise DataError(f"{place}: label {label!r} is neither an integer nor a name; correct it")
        text = None if label is None else str(label).strip()
        found.add(os.path.join(table.parent, path), _extension(path), text, place=place)
    if len(found) == before:
        raise DataError(f"{table}: has no lines with images; give a path in every line")


def _csv_rows(path: Path) -> Iterator[_Row]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns = reader.fieldnames or []
            if "path" not in columns:
                raise DataError(
                    f"{path}: line 1: no column 'path' among {', '.join(map(repr, columns)) or 'nothing'}; "
                    "begin the file with the line path,label (or path), separated by commas"
                )
            others = [column for column in columns if column != "path"]
            if others and "label" not in columns:
                raise DataError(
                    f"{path}: line 1: no column 'label' among {', '.join(map(repr, columns))}; call the column with "
                    "the labels so, or leave path alone for images without labels"
                )
            for row in reader:
                yield reader.line_num, row["path"], row.get("label") or None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as a table ({error}); write it as CSV in UTF-8") from error


def _json_rows(path: Path) -> Iterator[_Row]:
    line = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            for line, text in enumerate(file, start=1):
                if text.strip():
                    row = json.loads(text)
                    if not isinstance(row, dict):
                        raise DataError(f'{path}: line {line}: no object; write {{"path": ..., "label": ...}}')
                    others = [key for key in row if key != "path"]
                    if others and "label" not in row:
                        raise DataError(
                            f'{path}: line {line}: no "label" beside {", ".join(map(repr, others))}; call it so, or '
                            "leave path alone for images without labels"
                        )
                    yield line, row.get("path"), row.get("label")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); write it as JSON lines in UTF-8") from error
    except json.JSONDecodeError as error:
        raise DataError(f'{path}: line {line}: no JSON ({error}); write {{"path": ..., "label": ...}}') from error
