"""Files with the labels of images in a folder or an archive: tables, and EDM's dataset.json."""

import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from jitscale.errors import DataError, data_error
from jitscale.preparation.forms.layouts import are_buckets
from jitscale.preparation.forms.listing import Tree
from jitscale.preparation.forms.search import Found, Images, Label, Search, extension_of
from jitscale.preparation.forms.tables import TABLES, labelled_paths, rows_of

EDM = "dataset.json"  # file of StyleGAN, EDM and EDM2
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # files of an ImageFolder of `datasets`

_LARGEST = 1 << 30  # bytes of a file of labels
_FEW = 3  # images that a message names

Picture = tuple[str, Found]  # its path below the folder, and the image


@dataclass(frozen=True)
class LabelFile:
    """The labels of images by their names."""

    place: str  # path of the file, for a message
    labels: dict[str, tuple[Label, str]]  # key: name; values: the label, and the place of it


def metadata_in(tree: Tree) -> str | None:
    """The metadata file of a folder. Raises a DataError if there are several."""
    found = [name for name in tree.files if name in METADATA]
    if len(found) > 1:
        raise DataError(f"{tree.place}: holds {' and '.join(found)}; pass --labels FILE with one of them")
    return found[0] if found else None


def read_metadata(search: Search, tree: Tree, name: str, part: str) -> LabelFile:
    """Read the metadata file `name` of the folder `tree`. If `part` is a folder in it, keep only its images.

    Raises a DataError if a path leads out of the folder.
    """
    place = tree.path_of(name)
    rows = rows_of(place, io.BytesIO(tree.read(name, _LARGEST)))
    labels: dict[str, tuple[Label, str]] = {}
    for row, path, label in labelled_paths(search, rows):
        if path.startswith("/") or "://" in path or ".." in path.split("/"):
            remedy = f"write it relative to {tree.place}, or pass the table itself as --input with a column path"
            raise DataError(f"{row}: {path!r} leads out of the folder; {remedy}")
        below = str(PurePosixPath(path))
        if below.startswith(part):
            _add(labels, below.removeprefix(part), label, row)
    return LabelFile(place, labels)


def read_edm(search: Search, place: str, content: bytes) -> LabelFile | None:
    """Read EDM's dataset.json, which has this `content`; None if it says that there are no labels.

    Raises a DataError if it is damaged, labels are vectors or negative, or it names an image twice.
    """
    what, damage = f"{place}: is no JSON", (ValueError, RecursionError)
    with data_error(what, "correct it (JSON allows no trailing comma), or pass --labels none", damage):
        values = json.loads(content)
    rows = values.get("labels") if isinstance(values, dict) else values
    if rows is None and isinstance(values, dict):
        search.note(f"{place}: says that there are no labels")
        return None
    remedy = 'write {"labels": [["00000/img00000000.png", 6], ...]}, or pass --labels none'
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{place}: holds no list of labels; {remedy}")
    labels: dict[str, tuple[Label, str]] = {}
    for number, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != 2 or not isinstance(row[0], str):
            raise DataError(f"{place}: entry {number} is {str(row)[:80]}, not an image with its label; {remedy}")
        name, label = row
        if isinstance(label, list):
            raise DataError(f"{place}: labels are vectors, as that of {name}; classes are numbers from 0: {remedy}")
        if isinstance(label, bool) or not isinstance(label, int) or label < 0:
            raise DataError(f"{place}: {name} has label {label!r}, which is no integer from 0; {remedy}")
        _add(labels, str(PurePosixPath(name.replace("\\", "/"))), label, place)
    if min(number for number, _ in labels.values() if isinstance(number, int)) > 0:
        search.note(f"{place}: no image has label 0, so class 0 is empty; if labels begin with 1, subtract 1")
    return LabelFile(place, labels)


def _add(labels: dict[str, tuple[Label, str]], name: str, label: Label, place: str) -> None:
    if name in labels:
        raise DataError(f"{place}: names {name} twice; every image must come once, remove one")
    labels[name] = label, place


def equal_buckets(tree: Tree, file: LabelFile) -> bool:
    """True if the classes are only the folders of a thousand images each, as in EDM's recipe for FFHQ."""
    folders = {name.partition("/")[0] for name in file.labels}
    return (
        len(folders) > 1
        and all(name.partition("/")[0].isdecimal() for name in file.labels)
        and all(label == int(name.partition("/")[0]) for name, (label, _) in file.labels.items())
        and are_buckets(tree)
    )


def labelled(search: Search, pictures: Iterable[Picture], file: LabelFile, *, strict: bool = False) -> Images:
    """The images that `file` names, with their labels. If `strict`, it must name all images.

    Raises a DataError if it names images that do not exist.
    """
    left, unnamed, stems = dict(file.labels), [], set()
    for name, found in pictures:
        if name not in left:
            unnamed.append(name)
            stems.add(_without_extension(name))
            continue
        label, place = left.pop(name)
        yield found._replace(label=label, place=place)
    if left:
        names = list(left)
        what = f"names {len(names)} files that are not there ({_few(names)})"
        remedy = "copy them, or remove their lines"
        if any(_without_extension(name) in stems for name in names):
            remedy = "images with these names and another extension are there: write the extensions that they have now"
        raise DataError(f"{file.place}: {what}; {remedy}")
    if unnamed and strict:
        what = f"names no label for {len(unnamed)} images ({_few(unnamed)})"
        raise DataError(f"{file.place}: {what}; add them, or pass --labels none or folders")
    if unnamed:
        search.note(f"{file.place}: does not name {len(unnamed)} images, which are left out ({_few(unnamed)})")


def labelled_by(search: Search, tree: Tree, pictures: Sequence[Picture], path: Path) -> Images:
    """The images that the user's file `path` names; it may lie anywhere.

    Its names may be paths below the folder of the images or below that of the file, names of files, or names without
    extension.
    """
    if search.labels_read:
        raise DataError(f"{path}: holds the labels of one folder or archive; pass each --input in a command of its own")
    search.labels_read = True
    content = _content(path)
    if extension_of(path.name) == "json":
        file = read_edm(search, str(path), content)
        if file is None:
            raise DataError(f"{path}: says that there are no labels; pass --labels none")
    elif extension_of(path.name) in TABLES:
        labels: dict[str, tuple[Label, str]] = {}
        for place, name, label in labelled_paths(search, rows_of(str(path), io.BytesIO(content)), ids=True):
            _add(labels, os.path.normpath(name), label, place)
        file = LabelFile(str(path), labels)
    else:
        raise DataError(f"{path}: is no file of labels that is read; give a .{', .'.join(TABLES)} or {EDM}")
    ways: list[Callable[[Picture], str]] = [lambda picture: picture[0]]
    if os.path.isdir(tree.place):
        ways.append(lambda picture: os.path.relpath(picture[1].path, path.parent))
    ways += [lambda picture: PurePosixPath(picture[0]).name, lambda picture: PurePosixPath(picture[0]).stem]
    best: list[str] = []
    most = 0
    for way in ways:
        names = [way(picture) for picture in pictures]
        matches = sum(name in file.labels for name in names)
        if matches > most:
            best, most = names, matches
    if not most:
        known = f"it names {_few(list(file.labels))}, the images are {_few([name for name, _ in pictures])}"
        raise DataError(f"{path}: names no image of {tree.place}: {known}; give a table of these images")
    counted: set[str] = set()
    for name in best:
        if name in counted and name in file.labels:
            raise DataError(f"{path}: {name} may be several images of {tree.place}; write their paths")
        counted.add(name)
    yield from labelled(search, zip(best, (found for _, found in pictures), strict=True), file)


def _content(path: Path) -> bytes:
    with data_error(f"{path}: cannot be read", "correct --labels: folders, none, or a file of labels"):
        return path.read_bytes()


def _without_extension(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_FEW]) + (", ..." if len(names) > _FEW else "")
