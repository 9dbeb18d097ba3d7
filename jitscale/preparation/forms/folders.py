"""Images in folders, and in archives as if they were folders; classes are folders, or come from a file of labels."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from jitscale.data.images import EXTENSIONS
from jitscale.errors import DataError
from jitscale.preparation.forms.archives import tree_of_zip, unwrapped
from jitscale.preparation.forms.imagenet import is_flat, labels_of_flat
from jitscale.preparation.forms.label_files import (
    EDM,
    Picture,
    equal_buckets,
    labelled,
    labelled_by,
    metadata_in,
    read_edm,
    read_metadata,
)
from jitscale.preparation.forms.layouts import (
    are_buckets,
    of_one_split,
    part_of,
    refuse_label_file,
    refuse_splits,
    say_if_one_class,
)
from jitscale.preparation.forms.listing import Listing, Tree
from jitscale.preparation.forms.search import PICTURES, Images, Search, extension_of

_LATENTS = re.compile(r"img-mean-std-\d+\.npy")  # latents of EDM2's encoder
_LARGEST_EDM = 1 << 30  # bytes


def images_in_folder(search: Search, tree: Tree) -> Images:
    """The images of a folder.

    Labels come from a file that the user names, from EDM's dataset.json or from a metadata file. Else the top folders
    are the classes. Images in the folder itself, or in numbered buckets, have no labels.
    """
    labels = search.option("labels")
    metadata = metadata_in(tree) if labels is None else None
    whole, (tree, part) = tree, part_of(search, tree, has_labels=EDM in tree.files or metadata is not None)
    if labels == "folders":
        yield from _in_classes(search, tree, trusted=True)
        return
    if labels is None and metadata is None:
        metadata = metadata_in(tree)
    if labels is None and metadata is None and EDM not in tree.files:
        if not are_buckets(tree):
            yield from _in_classes(search, tree, trusted=False)
            return
        what = f"the folders {tree.folders[0]} to {tree.folders[-1]} hold a thousand images each, by their numbers"
        search.note(f"{tree.place}: {what}, and are no classes; --labels folders takes them for classes")
    refuse_splits(tree.place, tree.folders, search.known)
    pictures = _pictures(search, tree, extensions=EXTENSIONS if EDM in tree.files else PICTURES)
    if labels not in (None, "none"):
        yield from labelled_by(search, tree, list(pictures), Path(labels))
    elif labels is None and EDM in tree.files:
        yield from _of_edm(search, tree, pictures)
    elif labels is None and metadata is not None:
        holder, inside = (whole, part) if metadata in whole.files else (tree, "")
        yield from labelled(search, pictures, read_metadata(search, holder, metadata, inside))
    else:
        yield from (found for _, found in pictures)


def first_image(tree: Tree) -> str | None:
    """The path of an image in `tree` or in the folders below; None if there is none."""
    for name in tree.files:
        if extension_of(name) in PICTURES:
            return tree.path_of(name)
    return next((path for name in tree.folders if (path := first_image(tree.below(name))) is not None), None)


def has_zips(listing: Listing) -> bool:
    """True if a folder holds zips, and neither images nor folders."""
    return bool(listing.paths("zip")) and not listing.folders and not listing.paths(*PICTURES)


def images_in_folder_of_zips(search: Search, listing: Listing) -> Images:
    """The images of all zips of a folder, of one split."""
    for path in of_one_split(search, listing.folder, listing.paths("zip")):
        yield from images_in_zip(search, Path(path))


def images_in_zip(search: Search, path: Path) -> Images:
    """The images of a zip, which is read like a folder."""
    yield from images_in_folder(search, unwrapped(search, tree_of_zip(path)))


def _of_edm(search: Search, tree: Tree, pictures: Iterator[Picture]) -> Images:
    """The images next to EDM's dataset.json."""
    file = read_edm(search, tree.path_of(EDM), tree.read(EDM, _LARGEST_EDM))
    if file is not None and equal_buckets(tree, file):
        what = "its classes are only folders of a thousand images each, as in EDM's FFHQ, so they are not used"
        search.note(f"{file.place}: {what}; --labels {file.place} takes them for classes")
        file = replace(file, labels={name: (None, place) for name, (_, place) in file.labels.items()})
    if file is None:
        yield from (found for _, found in pictures)
    else:
        yield from labelled(search, pictures, file, strict=True)


def _in_classes(search: Search, tree: Tree, *, trusted: bool) -> Images:
    """The images below each folder, whose class is the folder; or those of `tree` itself, without classes.

    Files that look like labels are refused, unless `trusted`: then the user has chosen the folders.
    """
    here = list(_files(search, tree, "", PICTURES, refuse_labels=not trusted))
    classes = set()
    for name in tree.folders:
        try:
            for _, found in _pictures(search, tree.below(name), refuse_labels=not trusted):
                classes.add(name)
                yield found._replace(label=name)
        except DataError:  # such as a file of labels: if it lies in a split, the remedy is to choose the split
            refuse_splits(tree.place, tree.folders, search.known)
            raise
        if name not in classes:
            search.skipped.append(f"{tree.path_of(name)}/ (no image)")
    if classes and here:
        found_both = f"folders of classes ({len(classes)}) and images without a class ({len(here)})"
        raise DataError(f"{tree.place}: holds {found_both}; keep one kind in a folder")
    if trusted and not classes:
        raise DataError(f"{tree.place}: no folder in it holds images, which --labels folders needs; leave it out")
    refuse_splits(tree.place, classes, search.known, tree.folders)
    say_if_one_class(tree.place, classes, search.known)
    names = [name for name, _ in here]
    label_of = labels_of_flat(search, Path(tree.place), names) if is_flat(names) else lambda name: None
    yield from (found._replace(label=label_of(name)) for name, found in here)


def _pictures(
    search: Search,
    tree: Tree,
    above: str = "",
    *,
    extensions: tuple[str, ...] = PICTURES,
    refuse_labels: bool = False,
) -> Iterator[Picture]:
    """The images in `tree` and its folders. Other files are counted. `above` is the path to `tree`, with a slash."""
    yield from _files(search, tree, above, extensions, refuse_labels=refuse_labels)
    for name in tree.folders:
        below = tree.below(name)
        yield from _pictures(search, below, f"{above}{name}/", extensions=extensions, refuse_labels=refuse_labels)


def _files(
    search: Search, tree: Tree, above: str, extensions: tuple[str, ...], *, refuse_labels: bool
) -> Iterator[Picture]:
    """The images in `tree` itself."""
    search.skipped += [f"{tree.path_of(name)} (hidden)" for name in tree.hidden]
    pictures = [name for name in tree.files if extension_of(name) in extensions]
    for name in tree.files:
        if extension_of(name) in extensions:
            if _LATENTS.fullmatch(name):
                _refuse_latents(tree, name)
            yield above + name, tree.image(name)
            continue
        if _LATENTS.fullmatch(name):
            _refuse_latents(tree, name)
        if refuse_labels:
            _refuse_label_file(tree, name, pictures)
        search.ignored[extension_of(name)] += 1


def _refuse_label_file(tree: Tree, name: str, pictures: list[str]) -> None:
    refuse_label_file(tree.path_of(name), pictures, lambda most: tree.read(name, most))


def _refuse_latents(tree: Tree, name: str) -> None:
    what = "holds VAE latents of EDM2, not pixels"
    raise DataError(f"{tree.path_of(name)}: {what}; give the zip or folder that they were made from")
