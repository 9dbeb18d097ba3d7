"""Folders of images: a folder for each class, or images without classes."""

import os
from collections.abc import Iterator

from jitscale.errors import DataError
from jitscale.preparation.forms.layouts import refuse_label_file, refuse_splits, say_if_one_class
from jitscale.preparation.forms.listing import Listing, entries_of, is_folder
from jitscale.preparation.forms.search import PICTURES, Found, Images, Search, extension_of


def images_in_folder(search: Search, listing: Listing) -> Images:
    """The images of a folder: those below each of its folders, which is their class, or its own, without classes."""
    folder, pictures = listing.folder, listing.paths(*PICTURES)
    others = [name for name in listing.files if extension_of(name) not in PICTURES]
    search.ignored.update(map(extension_of, others))
    for name in others:
        refuse_label_file(str(folder / name), pictures)
    classes = set()
    for name in listing.folders:
        for path in _pictures_below(search, str(folder / name)):
            classes.add(name)
            yield Found(path, extension_of(path), name, path)
    if classes and pictures:
        found = f"folders of classes ({len(classes)}) and images without a class ({len(pictures)})"
        raise DataError(f"{folder}: holds {found}; keep one kind in a folder")
    refuse_splits(folder, classes, search.known, listing.folders)
    say_if_one_class(folder, classes, search.known)
    for path in pictures:
        yield Found(path, extension_of(path), None, path)


def _pictures_below(search: Search, folder: str, above: tuple[str, ...] = ()) -> Iterator[str]:
    """Paths of the images in `folder` and the folders in it; `above` are those that led here."""
    here = os.path.realpath(folder)
    for entry in entries_of(folder):
        if is_folder(entry):
            real = os.path.realpath(entry.path)
            if entry.is_symlink() and ((here + "/").startswith(real + "/") or real in above):
                raise DataError(f"{entry.path}: is a link to a folder that holds it, without end; remove it")
            yield from _pictures_below(search, entry.path, (*above, here))
        elif (extension := extension_of(entry.name)) in PICTURES:
            yield entry.path  # packing lists it as a bad input if it cannot be read
        else:
            refuse_label_file(entry.path)
            search.ignored[extension] += 1
