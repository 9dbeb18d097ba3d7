"""Folders that look like classes but are not: splits of a data set, parts of it, numbered buckets; files of labels.

If they were taken for classes, the labels would be wrong without a message. So they are refused, unless the user says
what they are.
"""

import logging
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath, PurePosixPath

from jitscale.data.tar_members import SPLIT, holds_labels
from jitscale.errors import DataError
from jitscale.preparation.forms.listing import Tree, beginning_of
from jitscale.preparation.forms.search import PICTURES, Found, Search, extension_of

logger = logging.getLogger(__name__)

_SPLIT = re.compile(rf"{SPLIT}([_-]?(set|data|images|\d+)|[_-]?(?-i:[AB]))?", re.IGNORECASE)  # trainA: CycleGAN
_SYNONYMS = {"training": "train", "testing": "test", "eval": "test"}
_SYNONYMS |= dict.fromkeys(("val", "valid", "dev"), "validation")
# Next to a split, or next to each other, they are no classes. Pascal VOC has JPEGImages, ImageSets and Segmentation*.
_PART = re.compile(
    r"(un(labell?ed|sup(ervised)?)|extra|(jpe?g)?im(age|g)s?|(segmentation[_-]?)?masks?|segmentation(class|object)"
    r"|labels?|annotations?|ground[_-]?truth)([_-]?(sets?|data|images|\d+))?",
    re.IGNORECASE,
)
_IMAGES = re.compile(r"(jpe?g)?im", re.IGNORECASE)
_WORDS = re.compile(r"[^A-Za-z]+")
_BUCKET = re.compile(r"\d{5}")
_PER_BUCKET = 1000
_NUMBERED = re.compile(r"(img)?(\d+)")  # name of an image of EDM's tools, or of FFHQ


def refuse_label_file(path: str, images: Collection[str] = (), read: Callable[[int], bytes] | None = None) -> None:
    """Raise a DataError if the file `path`, which lies among images, seems to hold their labels.

    Its name or its lines tell. A possible table that cannot be read is refused too. For `images` see `holds_labels`;
    `read` gives the beginning of a file in an archive.
    """
    if holds_labels(PurePosixPath(path).name, read or partial(beginning_of, path), images):
        what = "lies among the images and seems to hold labels"
        remedy = "pass --labels FILE with their table, --labels folders for the names of folders, or --labels none"
        raise DataError(f"{path}: {what}; {remedy}")


def part_of(search: Search, tree: Tree, *, has_labels: bool) -> tuple[Tree, str]:
    """The part of a data set that the user has chosen, and its folder with a slash; `tree` itself without parts.

    Splits lie above the classes, as in train/cat, or in each of them, as in cat/train. Raises a DataError if all
    folders hold the same folders and the user does not say what they are, unless the labels come from elsewhere.
    """
    split = search.options.split
    alike = _folders_in_each(tree)
    inside = bool(alike) and all(map(_SPLIT.fullmatch, alike))
    parts = alike if inside else _parts(tree.folders, ()) or (list(tree.folders) if alike else [])
    if split is None or not parts:
        says_nothing = (None, "none") if inside else (None,)  # --labels none would mix the images of all splits
        is_said = has_labels or search.options.labels not in says_nothing or set(tree.folders) <= search.known
        if alike and not is_said and not _parts(tree.folders, search.known):
            remedy = f"pass --split {parts[0]} for one of these"
            if inside:
                what = f"each folder in it holds {_listed(alike)}, splits of a data set"
                raise DataError(f"{tree.place}: {what}; {remedy}")
            what = f"the folders {_listed(tree.folders)} hold the same folders ({_listed(alike)})"
            raise DataError(f"{tree.place}: {what}; {remedy}, or --labels folders to take them for classes")
        return tree, ""
    search.option("split")
    named = [name for name in parts if name == split] or [name for name in parts if _same_split(name, split)]
    if len(named) != 1:
        raise DataError(f"{tree.place}: holds {_listed(parts)}, not {split}; pass --split {parts[0]}")
    search.note(f"{tree.place}: of {_listed(parts)}, only {named[0]} is read")
    return (_Inside(tree, named[0]), "") if inside else (tree.below(named[0]), f"{named[0]}/")


@dataclass(frozen=True)
class _Inside:
    """Folders of classes; in each of them, only one split is read. See `Tree`."""

    tree: Tree
    split: str

    @property
    def place(self) -> str:
        return self.tree.place

    @property
    def folders(self) -> Sequence[str]:
        return self.tree.folders

    @property
    def files(self) -> Sequence[str]:
        return self.tree.files

    @property
    def hidden(self) -> Sequence[str]:
        return self.tree.hidden

    def below(self, name: str) -> Tree:
        return self.tree.below(name).below(self.split)

    def path_of(self, name: str) -> str:
        return self.tree.path_of(name)

    def image(self, name: str) -> Found:
        return self.tree.image(name)

    def read(self, name: str, most: int) -> bytes:
        return self.tree.read(name, most)


def _folders_in_each(tree: Tree) -> list[str]:
    """The folders that each folder of `tree` holds, if all hold the same ones, and several; else empty."""
    if len(tree.folders) < 2:
        return []
    first: list[str] = []
    for number, name in enumerate(tree.folders):
        names = list(tree.below(name).folders)
        if len(names) < 2 or (number and names != first):
            return []
        first = names
    return first


def _same_split(name: str, split: str) -> bool:
    return _kind_of_split(name) == (_kind_of_split(split) or "no split")


def _kind_of_split(name: str) -> str:
    """The split that `name` stands for: train, validation or test; empty for other names."""
    match = _SPLIT.fullmatch(name)
    return _SYNONYMS.get(match[1].lower(), match[1].lower()) if match else ""


def refuse_splits(
    place: Path | str, classes: Iterable[str], named: Collection[str], folders: Iterable[str] = ()
) -> None:
    """Raise a DataError if the `classes` of the folder or archive `place` are splits, or images and their masks or
    labels.

    `folders` are all folders, also those without an image. Classes that the user has `named` are accepted.
    """
    if parts := _parts(classes, named, folders):
        what = f"{' and '.join(parts)} are parts of a data set" if len(parts) > 1 else f"{parts[0]} is a split"
        first = next((name for name in parts if _kind_of_split(name) == "train"), parts[0])
        remedy = f"pass --split {first} for one of them; if they are classes, name them with --class-names"
        raise DataError(f"{place}: {what}, and would become classes; {remedy}")


def holds_splits(paths: Iterable[str]) -> bool:
    """True if the folders of all images of an archive are splits, by the `paths` of the images."""
    tops = {path.partition("/")[0] if "/" in path else "" for path in paths}
    return bool(_parts(tops, ()))


def _parts(classes: Iterable[str], named: Collection[str], folders: Iterable[str] = ()) -> list[str]:
    """Names in `classes` and `folders` that are parts of a data set (`refuse_splits`); empty if they are classes."""
    folders = sorted(set(folders) - set(classes))
    classes = sorted(set(classes) - set(named))
    splits = [name for name in classes if _SPLIT.fullmatch(name)]
    others = [name for name in classes if _PART.fullmatch(name)]
    if classes and len(splits) + len(others) == len(classes):
        others.sort(key=lambda name: not _IMAGES.match(name))
        others += [name for name in folders if _PART.fullmatch(name)]
        splits += others if len(splits) + len(others) > 1 else []
    return splits if splits and (len(splits) > 1 or len(splits) == len(classes)) else []


def say_if_one_class(place: str, classes: Collection[str], named: Collection[str]) -> None:
    """Warn if all images of `place` lie in one folder that the user has not `named`: its folders may be the classes."""
    if len(classes) == 1 and not set(classes) & set(named):
        name = next(iter(classes))
        what = f"all images are taken for one class, {name!r}, since one folder holds them"
        remedy = f"if it holds folders of classes, or images without a class, give {PurePath(place) / name}"
        logger.warning("%s: %s; %s", place, what, remedy)


def are_buckets(tree: Tree) -> bool:
    """True if its folders are no classes but hold a thousand images each by number, as in FFHQ and EDM."""
    if not tree.folders or not all(map(_BUCKET.fullmatch, tree.folders)):
        return False
    for folder in tree.folders:
        names = [name for name in tree.below(folder).files if extension_of(name) in PICTURES]
        for name in names:
            match = _NUMBERED.fullmatch(PurePosixPath(name).stem)
            if match is None or int(match[2]) // _PER_BUCKET * (1 if match[1] else _PER_BUCKET) != int(folder):
                return False
        if not names:
            return False
    return True


def of_one_split(search: Search, folder: Path | str, paths: Sequence[str]) -> list[str]:
    """The archives of a folder or pattern that belong to the split that the user wants, by their names.

    Raises a DataError if there are several splits and none is chosen, or no archive of the chosen one.
    """
    firsts, split = splits_of_files([PurePath(path).name for path in paths]), search.options.split
    if not firsts or (len(firsts) == 1 and split is None):
        return list(paths)
    some = " and ".join(sorted(firsts.values()))
    remedy = f"pass --split {'train' if 'train' in firsts else min(firsts)}"
    if split is None:
        raise DataError(f"{folder}: holds the files of several splits ({some}); {remedy} for one")
    search.option("split")
    wanted = _kind_of_split(split)
    if wanted not in firsts:
        raise DataError(f"{folder}: holds no file of the split {split}, but {some}; {remedy}")
    chosen = [path for path in paths if _split_in(PurePath(path).name) == wanted]
    search.note(f"{folder}: {len(chosen)} of {len(paths)} files are of the split {split}")
    return chosen


def splits_of_files(names: Iterable[str]) -> dict[str, str]:
    """The splits that occur in names of files, and the first file of each."""
    firsts: dict[str, str] = {}
    for name in names:
        if kind := _split_in(name):
            firsts.setdefault(kind, name)
    return firsts


def _split_in(name: str) -> str:
    """The split that a word of a file's name says; empty if none does."""
    words = _WORDS.split(PurePath(name).stem.lower())
    return next((kind for kind in map(_kind_of_split, words) if kind in ("train", "validation", "test")), "")


def _listed(names: Sequence[str]) -> str:
    """The first three names; if there are more, also their number."""
    return ", ".join(names[:3]) + (f", ... ({len(names)})" if len(names) > 3 else "")
