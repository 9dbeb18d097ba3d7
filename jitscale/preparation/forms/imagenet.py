"""ImageNet (ILSVRC 2012) as flat images, whose classes are in another file or in their names.

Classes are numbered by sorted WNID, as in the training set's tar of tars and its folders. The devkit's IDs have another
order, in which every class has another number.
"""

import csv
import os
import re
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from jitscale.errors import DataError, data_error
from jitscale.preparation.forms.layouts import refuse_label_file
from jitscale.preparation.forms.listing import Listing
from jitscale.preparation.forms.search import PICTURES, Found, Images, Label, Search, extension_of

CLASSES = 1000

# Names of flat images: of the validation and test sets, and of the hub's older tars, whose names end in the WNID.
_FLAT = re.compile(r"ILSVRC2012_(?P<split>val|test)_\d{8}|.*_(?P<wnid>n\d{8})")
_WNID = re.compile(r"n\d{8}")
_KAGGLE, _DEVKIT = "LOC_val_solution.csv", "ILSVRC2012_validation_ground_truth.txt"
_IDS, _META = "map_clsloc.txt", "meta.mat"  # tables of the devkit's IDs
TREE = PurePosixPath("ILSVRC/Data/CLS-LOC")


def described_wnids(names: Sequence[str]) -> str:
    """Describes a tar of one tar for each class: other sets of ImageNet look like its training set."""
    said = f"a tar of {len(names)} tars, each a class"
    if len(names) != CLASSES and all(map(_WNID.fullmatch, names)):
        said += f"; ImageNet's training set has {CLASSES}, ILSVRC2012_img_train_t3.tar has 120 (dogs)"
    return said


# Flat images


def is_flat(names: Collection[str]) -> bool:
    """True if most of these `names` are like those of ImageNet's flat images."""
    return sum(_FLAT.fullmatch(_stem(name)) is not None for name in names) * 2 > len(names)


def is_flat_folder(listing: Listing) -> bool:
    """True if a folder holds ImageNet's flat images."""
    return not listing.folders and is_flat(listing.paths(*PICTURES))


def images_in_flat_folder(search: Search, listing: Listing) -> Images:
    """The images of such a folder. The labels may lie there too, or at the root of Kaggle's tree."""
    folder, pictures = listing.folder, listing.paths(*PICTURES)
    others = [name for name in listing.files if extension_of(name) not in PICTURES]
    search.ignored.update(extension_of(name) for name in others if name not in (_KAGGLE, _DEVKIT))
    label_of = labels_of_flat(search, folder, pictures)
    for name in others:
        if name not in (_KAGGLE, _DEVKIT) and search.options.ground_truth is None and not search.without_labels():
            refuse_label_file(str(folder / name), pictures)
    for path in pictures:
        yield Found(path, extension_of(path), label_of(path), path)


def labels_of_flat(search: Search, place: Path, names: Sequence[str]) -> Callable[[str], Label]:
    """A function from the name of an image of `place`, one of `names`, to its class.

    Raises a DataError, now or when the function is called, if neither the name nor a file says the class.
    """
    splits = {match["split"] for match in map(_FLAT.fullmatch, map(_stem, names)) if match}
    if search.without_labels():
        return lambda name: None
    if "test" in splits:
        what = "holds images of ImageNet's test set, whose labels are not published"
        raise DataError(f"{place}: {what}; pass --labels none to use them without labels")
    truth = _truth_of(search, place, len(names)) if "val" in splits else None
    if truth is None:
        search.note(f"{place}: the class of each image is the WNID at the end of its name")

    def label_of(name: str) -> Label:
        match = _FLAT.fullmatch(_stem(name))
        if match is None:
            remedy = "move it away, or pass --labels none for no labels"
            raise DataError(f"{place}: {PurePosixPath(name).name} is not called like the other images; {remedy}")
        if match["wnid"]:
            return match["wnid"]
        assert truth is not None
        if (wnid := truth.wnids.get(match[0])) is None:
            what = f"holds {match[0]}, which is none of the {len(truth.wnids)} images of {truth.path}"
            raise DataError(f"{place}: {what}; pass the --ground-truth of these images")
        return wnid

    return label_of


def _stem(name: str) -> str:
    return PurePosixPath(name).name.partition(".")[0]


# The classes of the validation images


@dataclass(frozen=True)
class _Truth:
    path: Path
    wnids: dict[str, str]  # key: name of the image, without extension


def _truth_of(search: Search, place: Path, images: int) -> _Truth:
    """The classes of the validation images, from the user's file or one near `place`; notes the class names."""
    given = search.option("ground_truth")
    path = _truth_beside(place) if given is None else Path(given)
    if path is None:
        what = f"holds {images} images of ImageNet's validation set, whose names do not say the class"
        files = f"Kaggle's {_KAGGLE}, or the devkit's {_DEVKIT} next to {_IDS} or {_META}"
        raise DataError(f"{place}: {what}; pass --ground-truth with {files}; or --labels none for no labels")
    with data_error(f"{path}: cannot be read", "correct --ground-truth", (OSError, UnicodeDecodeError)):
        text = path.read_text(encoding="utf-8-sig")
    if "," in text.partition("\n")[0]:
        wnids = _from_kaggle(path, text)
        names = sorted(set(wnids.values()))
    else:
        wnids, names = _from_devkit(path, text)
    search.name_classes(names, str(path))
    search.note(f"{place}: the classes are those of {path}, numbered by sorted WNID")
    return _Truth(path, wnids)


def _truth_beside(place: Path) -> Path | None:
    """A file of labels in the folder `place`, or at the root of the tree around it; None without one."""
    absolute = Path(os.path.abspath(place))
    folders = [absolute] if place.is_dir() else []
    if absolute.parent.parts[-len(TREE.parts) :] == TREE.parts:
        folders.append(absolute.parents[len(TREE.parts)])
    return next((folder / name for folder in folders for name in (_KAGGLE, _DEVKIT) if (folder / name).exists()), None)


def _from_kaggle(path: Path, text: str) -> dict[str, str]:
    """The WNID of each image: that of the first box of its line."""
    wnids: dict[str, str] = {}
    with data_error(f"{path}: cannot be read as a table", "download it again", csv.Error):
        rows = csv.DictReader(text.splitlines(), strict=True)
        for row in rows:
            name, wnid = row.get("ImageId"), (row.get("PredictionString") or "").partition(" ")[0]
            if not name or not _WNID.fullmatch(wnid):
                what = f"has no ImageId and PredictionString that begins with a WNID, as {_KAGGLE} has"
                raise DataError(f"{path}: line {rows.line_num}: {what}; pass that file")
            wnids[name] = wnid
    return wnids


def _from_devkit(path: Path, text: str) -> tuple[dict[str, str], list[str]]:
    """The WNID of each image by its number, which is its line; and all WNIDs, sorted."""
    lines = text.split()
    if wrong := next((line for line in lines if not line.isdecimal()), "" if lines else "no line"):
        what = f"holds {wrong!r}, where {_DEVKIT} has one ID of a class in a line"
        raise DataError(f"{path}: {what}; pass that file or {_KAGGLE}")
    table = wnids_of_ids(path)
    wnids = {}
    for number, line in enumerate(lines, start=1):
        if int(line) not in table:
            raise DataError(f"{path}: line {number}: no class has the ID {line}; it is in 1..{len(table)}")
        wnids[f"ILSVRC2012_val_{number:08d}"] = table[int(line)]
    return wnids, sorted(table.values())


def wnids_of_ids(path: Path) -> dict[int, str]:
    """The WNID of each of the devkit's IDs, from 1; read from `path` (map_clsloc.txt or meta.mat) or a file near it.

    Raises a DataError if there is no such table.
    """
    near = [path.parent, path.parent / "data", path.parent.parent / "data"]
    candidates = [path, *(folder / name for folder in near for name in (_IDS, _META))]
    for candidate in candidates:
        if candidate.exists() and (table := dict(_id_rows(candidate))):
            if sorted(table) != list(range(1, len(table) + 1)) or len(set(table.values())) != len(table):
                remedy = "copy it again"
                raise DataError(f"{candidate}: its IDs are not 1..{len(table)}, each with a WNID of its own; {remedy}")
            return table
    what = "the devkit's IDs of classes need a table of their WNIDs"
    raise DataError(f"{path}: {what}; put {_IDS} (of a later devkit) or {_META} next to it, or pass {_KAGGLE}")


def _id_rows(path: Path) -> Iterator[tuple[int, str]]:
    """ID and WNID of each class; nothing if the file is no such table."""
    if path.suffix == ".mat":
        yield from _rows_of_meta(path)
        return
    with data_error(f"{path}: cannot be read", "copy it again", (OSError, UnicodeDecodeError)):
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    for line in lines:
        wnid, number, *_ = [*line.split(), "", ""]
        if not _WNID.fullmatch(wnid) or not number.isdecimal():
            return
        yield int(number), wnid


def _rows_of_meta(path: Path) -> Iterator[tuple[int, str]]:
    try:
        from scipy.io.matlab import MatReadError, loadmat  # noqa: PLC0415 (optional)
    except ImportError as error:
        remedy = f"pip install scipy, or put {_IDS} of a later devkit next to it"
        raise DataError(f"{path}: scipy, which reads it, is not installed; {remedy}") from error
    damage = (OSError, ValueError, TypeError, KeyError, NotImplementedError, MatReadError, zlib.error)
    with data_error(f"{path}: cannot be read as the devkit's table of classes", "copy it again", damage):
        for synset in loadmat(path, squeeze_me=True)["synsets"]:
            number, wnid, _, _, children = synset.item()[:5]
            if children == 0:
                yield int(number), str(wnid)
