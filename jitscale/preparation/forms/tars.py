"""webdataset tars, and tars of tars as ImageNet is published; both are read in place."""

import os
from pathlib import Path, PurePosixPath

from jitscale.data.tar_index import sound_scan
from jitscale.data.tar_members import LOST_LINK, is_hidden
from jitscale.errors import DataError
from jitscale.preparation.forms.folders import images_in_folder
from jitscale.preparation.forms.imagenet import described_wnids, is_flat, labels_of_flat
from jitscale.preparation.forms.layouts import refuse_splits, refuse_tars_of_splits
from jitscale.preparation.forms.listing import Listing
from jitscale.preparation.forms.search import PICTURES, Found, Images, Search, extension_of
from jitscale.preparation.forms.tars_of_tars import is_tar_of_tars, members_within
from jitscale.preparation.sources import Storage


def has_tars(listing: Listing) -> bool:
    """Whether tars lie in a folder."""
    return bool(listing.paths("tar"))


def images_in_folder_of_tars(search: Search, listing: Listing) -> Images:
    """The images of all tars of a folder, beside which no others may lie."""
    folder, tars = listing.folder, listing.paths("tar")
    others = Listing(folder, listing.folders, [name for name in listing.files if extension_of(name) in PICTURES])
    if (image := next(images_in_folder(search, others), None)) is not None:
        what = f"holds images, such as {image.path}, and tars ({len(tars)})"
        raise DataError(f"{folder}: {what}; keep one kind in a folder")
    refuse_tars_of_splits(folder, tars)
    for path in tars:
        yield from images_in_tar(search, Path(path))


def images_in_tar(search: Search, path: Path) -> Images:
    """The images of a tar."""
    if is_tar_of_tars(path):
        yield from _in_tar_of_tars(search, path)
        return
    scan = sound_scan(path)
    if scan.unread_labels:
        raise DataError(f"{path}: {scan.unread_labels}")
    search.ignored.update(scan.skipped)
    unlabelled = [sample.key for sample in scan.samples if sample.label is None]
    label_of = labels_of_flat(search, path, unlabelled) if is_flat(unlabelled) else lambda key: None
    for sample in scan.samples:
        place = f"{path}: byte {sample.offset if sample.label is None else sample.label_offset}"
        label = label_of(sample.key) if sample.label is None else search.label(sample.label, place)
        yield Found(str(path), sample.extension, label, place, sample.offset, sample.size, Storage.BYTES)


def _in_tar_of_tars(search: Search, path: Path) -> Images:
    """Classes and images in the order of their names, as they would be found in folders."""
    with path.open("rb") as file:
        inner = []
        for member, content in members_within(file, path, 0, os.fstat(file.fileno()).st_size):
            if content is None:
                search.ignored[extension_of(member.name) + LOST_LINK] += 1
                continue
            if extension_of(member.name) != "tar":
                what = f"byte {member.offset}: {member.name!r} is no tar, but others in it are"
                raise DataError(f"{path}: {what}; a tar of tars holds one .tar a class and nothing else")
            inner.append((PurePosixPath(member.name).stem, content.offset_data, content.size))
        refuse_splits(path, {label for label, _, _ in inner}, search.known)
        search.note(f"{path}: {described_wnids([label for label, _, _ in inner])}")
        for label, start, length in sorted(inner):
            pictures = []
            for member, content in members_within(file, path, start, length):
                extension = extension_of(member.name)
                if content is None:
                    search.ignored[extension + LOST_LINK] += 1
                elif extension in PICTURES and not is_hidden(member.name):
                    pictures.append((member.name, content.offset_data, content.size, extension))
                else:
                    search.ignored[extension] += 1
            for _, offset, size, extension in sorted(pictures):
                yield Found(str(path), extension, label, f"{path}: byte {offset}", offset, size, Storage.BYTES)
