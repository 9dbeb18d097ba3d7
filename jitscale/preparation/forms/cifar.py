"""CIFAR-10 and CIFAR-100 in their binary version: records of one or two labels, then planes of red, green and blue."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jitscale.data.images import UInt8Array
from jitscale.errors import DataError, data_error
from jitscale.preparation.forms.batches import images_in_split
from jitscale.preparation.forms.kinds import CIFAR_RECORDS, Kind, is_kind
from jitscale.preparation.forms.listing import Listing
from jitscale.preparation.forms.search import PICTURES, Found, Images, Label, Search, extension_of
from jitscale.preparation.sources import Storage

_PIXELS = 3 * 32 * 32  # bytes


@dataclass(frozen=True)
class _Labels:
    """One of the labels of a record, each a byte."""

    column: str
    classes: int
    names: str  # the file of their names, in the folder of the batches


_CIFAR_10 = (_Labels("label", 10, "batches.meta.txt"),)
_CIFAR_100 = (_Labels("coarse", 20, "coarse_label_names.txt"), _Labels("fine", 100, "fine_label_names.txt"))


def has_batches(listing: Listing) -> bool:
    """True if a folder holds batches of CIFAR, and neither images nor folders."""
    return not listing.folders and not listing.paths(*PICTURES) and bool(_batches(listing))


def images_in_folder_of_batches(search: Search, listing: Listing) -> Images:
    """The images of the batches of a folder, of one split."""
    known = {labels.names for labels in (*_CIFAR_10, *_CIFAR_100)}
    batches = _batches(listing)
    search.ignored.update(extension_of(name) for name in listing.files if name not in known and name not in batches)
    yield from images_in_split(search, listing, batches, _split_of, _images_in_batch_of)


def _images_in_batch_of(search: Search, listing: Listing, name: str) -> Images:
    yield from images_in_batch(search, listing.folder / name)


def images_in_batch(search: Search, path: Path) -> Images:
    """The images of one batch. Its class names lie next to it."""
    with data_error(f"{path}: cannot be read", "repair the storage"):
        found = _labels_of(path)
    if found is None:
        what = "has the size of a batch of CIFAR, but its labels are not in 0..9, nor in 0..19 and 0..99"
        raise DataError(f"{path}: {what}; copy it again, or give another file")
    kinds, labels = found  # labels: (records, kinds)
    column = _column(search, path, kinds)
    names = _class_names(search, path, kinds[column])
    record = len(kinds) + _PIXELS
    known: Sequence[Label] = [None] * len(labels) if search.without_labels() else labels[:, column].tolist()
    if names is not None:
        meanings = search.meanings(names, str(path.parent / kinds[column].names))
        known = [meanings[number] for number in labels[:, column].tolist()]
    for number, label in enumerate(known):
        start = number * record
        yield Found(str(path), "npy", label, f"{path}: byte {start}", start + len(kinds), _PIXELS, Storage.PLANES)


def _batches(listing: Listing) -> list[str]:
    names = [name for name in listing.files if extension_of(name) == "bin"]
    return [name for name in names if is_kind(listing.folder / name, Kind.CIFAR)]


def _split_of(name: str) -> str:
    return {"data_batch": "train", "train": "train", "test_batch": "test", "test": "test"}.get(
        name.removesuffix(".bin").rstrip("0123456789").rstrip("_"), ""
    )


def _labels_of(path: Path) -> tuple[tuple[_Labels, ...], UInt8Array] | None:
    """The kinds of labels in a batch, and all labels (records, kinds); None if it is no batch."""
    content: UInt8Array = np.memmap(path, np.uint8, "r")
    for record, kinds in zip(CIFAR_RECORDS, (_CIFAR_10, _CIFAR_100), strict=True):
        if len(content) % record == 0:
            labels: UInt8Array = content.reshape(-1, record)[:, : len(kinds)].copy()
            if (labels < [kind.classes for kind in kinds]).all():
                return kinds, labels
    return None


def _column(search: Search, path: Path, kinds: tuple[_Labels, ...]) -> int:
    """The number of the kind of labels to use."""
    if len(kinds) == 1 or search.without_labels():
        return 0
    columns = [kind.column for kind in kinds]
    chosen = search.option("label_column")
    if chosen is None:
        search.note(
            f"{path.parent}: CIFAR-100 with its 100 fine labels; --label-column coarse gives the 20 coarse ones"
        )
    elif chosen not in columns:
        raise DataError(f"{path}: has no labels called {chosen}; pass --label-column {' or '.join(columns)}")
    return columns.index(chosen or "fine")


def _class_names(search: Search, path: Path, labels: _Labels) -> list[str] | None:
    """The class names in the file next to a batch; None if there is none, or labels are not wanted."""
    names = path.parent / labels.names
    if search.without_labels():
        return None
    if not names.exists():
        search.note(f"{path.parent}: no {labels.names} here, so classes have no names")
        return None
    with data_error(f"{names}: cannot be read", "copy it again", (OSError, UnicodeDecodeError)):
        lines = names.read_text(encoding="utf-8").split()
    if len(lines) != labels.classes:
        raise DataError(f"{names}: names {len(lines)} classes, not {labels.classes}; copy it again, or remove it")
    return lines
