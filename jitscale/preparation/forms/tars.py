"""Webdataset tars, tars of folders, and tars of tars (as ImageNet is published). All are read in place."""

import os
from pathlib import Path, PurePosixPath

from jitscale.data.tar_index import sound_scan
from jitscale.data.tar_labels import CLS, LabelKey
from jitscale.data.tar_members import LOST_LINK, is_hidden
from jitscale.errors import DataError
from jitscale.preparation.forms.archives import tree_of_tar, unwrapped
from jitscale.preparation.forms.folders import first_image, images_in_folder
from jitscale.preparation.forms.imagenet import described_wnids, is_flat, labels_of_flat
from jitscale.preparation.forms.layouts import holds_splits, of_one_split, refuse_label_file, refuse_splits
from jitscale.preparation.forms.listing import Listing
from jitscale.preparation.forms.search import PICTURES, Found, Images, Search, extension_of
from jitscale.preparation.forms.tars_of_tars import is_tar_of_tars, members_within
from jitscale.preparation.sources import Storage
from jitscale.preparation.webdataset_info import INFO, counts_of, wrong_count


def has_tars(listing: Listing) -> bool:
    """True if tars lie in a folder."""
    return bool(listing.paths("tar"))


def images_in_folder_of_tars(search: Search, listing: Listing) -> Images:
    """The images of all tars of a folder, of one split. No other images may lie next to the tars."""
    folder, tars = listing.folder, listing.paths("tar")
    if (image := first_image(listing)) is not None:
        what = f"holds images, such as {image}, and tars ({len(tars)})"
        raise DataError(f"{folder}: {what}; keep one kind in a folder")
    others = _others(search, listing)
    tars = of_one_split(search, folder, tars)
    counts = counts_of(folder, {PurePosixPath(path).name for path in tars}, whole=True)
    labelled = False
    for path in map(Path, tars):
        found = 0
        for one in images_in_tar(search, path):
            labelled |= one.label is not None
            found += 1
            yield one
        if wrong := wrong_count(counts, path.name, found):
            raise DataError(f"{path}: {wrong}")
    if not labelled and search.options.labels is None and search.options.label_key is None:
        for name in others:
            refuse_label_file(str(folder / name))


def _others(search: Search, listing: Listing) -> list[str]:
    """The files next to the tars that do not describe them. All are ignored and counted."""
    stems = {PurePosixPath(name).stem for name in listing.files if extension_of(name) == "tar"}
    others = [name for name in listing.files if extension_of(name) != "tar" and name != INFO]
    described = [name for name in others if PurePosixPath(name).stem.removesuffix("_stats") in stems]
    metadata = [name for name in described if extension_of(name) in ("parquet", "json")]
    if metadata:
        what = f"{len(metadata)} files such as {metadata[0]} describe the tars, as in img2dataset, and are ignored"
        search.note(f"{listing.folder}: {what}")
    rest = [name for name in others if name not in set(described)]
    search.ignored.update(map(extension_of, rest))
    return rest


def images_in_tar(search: Search, path: Path) -> Images:
    """The images of a tar."""
    if is_tar_of_tars(path):
        yield from _in_tar_of_tars(search, path)
        return
    if search.options.labels not in (None, "none"):
        yield from images_in_folder(search, unwrapped(search, tree_of_tar(search, path)))
        return
    key = LabelKey.parse("none" if search.without_labels() else search.option("label_key"))
    scan = sound_scan(path, key)
    if search.without_labels() and holds_splits([sample.key for sample in scan.samples]):
        yield from images_in_folder(search, unwrapped(search, tree_of_tar(search, path)))
        return
    if scan.unread_labels:
        raise DataError(f"{path}: {scan.unread_labels}")
    search.ignored.update(scan.skipped)
    unlabelled = [sample.key for sample in scan.samples if sample.label is None]
    label_of = labels_of_flat(search, path, unlabelled) if is_flat(unlabelled) else lambda key: None
    if (there := scan.skipped["json"]) and key == CLS and all(sample.label is None for sample in scan.samples):
        search.note(f"{path}: {there} members .json, none .cls; --label-key json:KEY reads labels from a field of them")
    for sample in scan.samples:
        place = f"{path}: byte {sample.offset if sample.label is None else sample.label_offset}"
        label = label_of(sample.key) if sample.label is None else search.label(sample.label, place)
        yield Found(str(path), sample.extension, label, place, sample.offset, sample.size, Storage.BYTES)


def _in_tar_of_tars(search: Search, path: Path) -> Images:
    """The images, in the order of the names of classes and images, as in folders."""
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
        unlabelled = search.without_labels()
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
                place = f"{path}: byte {offset}"
                yield Found(str(path), extension, None if unlabelled else label, place, offset, size, Storage.BYTES)
