"""Folders of data sets that are more than folders of classes: labels in a file, or the splits of one data set.

Until such layouts are read, they are refused: taken for folders of classes they give other labels, without a word.
"""

import logging
import re
from collections.abc import Collection, Iterable
from pathlib import Path, PurePath

from jitscale.data.tar_members import SPLIT, holds_labels
from jitscale.errors import DataError, data_error

logger = logging.getLogger(__name__)

_SPLIT = re.compile(rf"{SPLIT}([_-]?(set|data|images|\d+)|[_-]?(?-i:[AB]))?", re.IGNORECASE)  # trainA: CycleGAN
# Beside a split, or beside each other, they are no classes. Pascal VOC has JPEGImages, ImageSets and Segmentation*.
_PART = re.compile(
    r"(un(labell?ed|sup(ervised)?)|extra|(jpe?g)?im(age|g)s?|(segmentation[_-]?)?masks?|segmentation(class|object)"
    r"|labels?|annotations?|ground[_-]?truth)([_-]?(sets?|data|images|\d+))?",
    re.IGNORECASE,
)
_IMAGES = re.compile(r"(jpe?g)?im", re.IGNORECASE)
_WORDS = re.compile(r"[^A-Za-z]+")
_KNOWN_FILES = {
    "dataset.json": "a StyleGAN or EDM data set, whose folders are no classes",
    "metadata.csv": "a Hugging Face image folder",
    "metadata.jsonl": "a Hugging Face image folder",
    "metadata.parquet": "a Hugging Face image folder",
}


def refuse_label_file(path: str, images: Collection[str] = ()) -> None:
    """Raise a DataError if the file `path`, which lies among images, holds their labels by its name or its lines.

    Also if it may be a table of them and cannot be read. `images` as of `holds_labels`.
    """

    def read(most: int) -> bytes:
        if not Path(path).is_file():
            return b""
        with data_error(f"{path}: cannot be read", "make it readable or move it away"), open(path, "rb") as file:
            return file.read(most)

    name = PurePath(path).name
    if holds_labels(name, read, images):
        kind = f" ({_KNOWN_FILES[name.lower()]})" if name.lower() in _KNOWN_FILES else ""
        remedy = "pass its images as a .csv with columns path,label; move such files away if folders are the classes"
        raise DataError(f"{path}: lies among the images and seems to hold labels{kind}, which is not read; {remedy}")


def refuse_splits(place: Path, classes: Iterable[str], named: Collection[str], folders: Iterable[str] = ()) -> None:
    """Raise a DataError if the `classes` of the folder or tar `place` are splits, or images and their masks or labels.

    Such labels may also lie in `folders` without an image. Not if the user has `named` the classes.
    """
    folders = sorted(set(folders) - set(classes))
    classes = sorted(set(classes) - set(named))
    splits = [name for name in classes if _SPLIT.fullmatch(name)]
    others = [name for name in classes if _PART.fullmatch(name)]
    if classes and len(splits) + len(others) == len(classes):
        others.sort(key=lambda name: not _IMAGES.match(name))
        others += [name for name in folders if _PART.fullmatch(name)]
        splits += others if len(splits) + len(others) > 1 else []
    if splits and (len(splits) > 1 or len(splits) == len(classes)):
        what = f"{' and '.join(splits)} are parts of a data set" if len(splits) > 1 else f"{splits[0]} is a split"
        remedy = f"give one of them, such as {place / splits[0]}; if they are classes, name them with --class-names"
        raise DataError(f"{place}: {what}, and would become classes; {remedy}")


def say_if_one_class(folder: Path, classes: Collection[str], named: Collection[str]) -> None:
    """Warn if all images of `folder` lie in one folder of it, which the user has not `named`: classes may lie below."""
    if len(classes) == 1 and not set(classes) & set(named):
        name = next(iter(classes))
        what = f"all images are taken for one class, {name!r}, since one folder holds them"
        remedy = f"if it holds folders of classes, or images without a class, give {folder / name}"
        logger.warning("%s: %s; %s", folder, what, remedy)


def refuse_tars_of_splits(folder: Path, tars: Iterable[str]) -> None:
    """Raise a DataError if the names of the `tars` in `folder` are those of several splits, such as train-000.tar."""
    first: dict[str, str] = {}  # split to the name of its first tar
    for name in (PurePath(path).name for path in tars):
        for word in _WORDS.split(PurePath(name).stem.lower()):
            kind = {"training": "train", "val": "validation", "valid": "validation", "testing": "test"}.get(word, word)
            if kind in ("train", "validation", "test"):
                first.setdefault(kind, name)
    if len(set(first.values())) > 1:
        what = f"holds the tars of several splits ({' and '.join(sorted(first.values()))})"
        raise DataError(f"{folder}: {what}; give those of one, for example '{folder}/*train*.tar'")
