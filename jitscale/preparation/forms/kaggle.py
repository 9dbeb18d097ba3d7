"""ImageNet as Kaggle publishes it: a tree with a folder for each split, ILSVRC/Data/CLS-LOC/train, val and test."""

import os
from pathlib import Path

from jitscale.errors import DataError
from jitscale.preparation.forms.folders import images_in_folder
from jitscale.preparation.forms.imagenet import TREE, images_in_flat_folder
from jitscale.preparation.forms.listing import Listing, listing_of
from jitscale.preparation.forms.search import Images, Search

_SPLITS = {"train": "train", "val": "val", "validation": "val", "test": "test"}


def is_tree(listing: Listing) -> bool:
    """True if a folder is Kaggle's tree, or one of the folders around its splits."""
    return _splits_folder(listing) is not None


def images_in_tree(search: Search, listing: Listing) -> Images:
    """The images of one split of Kaggle's tree."""
    folder = _splits_folder(listing)
    assert folder is not None
    there = [name for name in listing_of(folder).folders if name in _SPLITS]
    split = search.option("split")
    if split is None or _SPLITS.get(split) not in there:
        given = "" if split is None else f", not {split}"
        raise DataError(f"{listing.folder}: holds the splits {', '.join(there)} of ImageNet{given}; pass --split train")
    part = listing_of(folder / _SPLITS[split])
    yield from images_in_folder(search, part) if part.folders else images_in_flat_folder(search, part)


def _splits_folder(listing: Listing) -> Path | None:
    """The folder of train, val and test: `listing` itself or one below it; None without one."""
    for above in range(len(TREE.parts) + 1):
        rest = TREE.parts[above:]
        folder = listing.folder.joinpath(*rest)
        is_there = rest[0] in listing.folders if rest else os.path.abspath(folder).endswith(str(TREE))
        if is_there and any((folder / split).is_dir() for split in _SPLITS):
            return folder
    return None
