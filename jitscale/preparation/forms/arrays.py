"""Images as numpy arrays in .npz files: ImageNet-32 and 64, and stacks of other images.

ImageNet-32 and 64 hold `data`, uint8 (n, 3 S S): planes of red, green and blue. Their `labels` are the devkit's IDs,
from 1; the IDs are not in the order of sorted WNIDs. Nothing is unpickled.
"""

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from jitscale.errors import DataError, data_error
from jitscale.preparation.array_rows import ArrayHeader, header_of, offset_of
from jitscale.preparation.forms.batches import images_in_split
from jitscale.preparation.forms.imagenet import CLASSES, wnids_of_ids
from jitscale.preparation.forms.kinds import Kind, is_kind
from jitscale.preparation.forms.listing import Listing
from jitscale.preparation.forms.search import PICTURES, Found, Images, Label, Search, extension_of
from jitscale.preparation.sources import NO_GROUP, Storage

_DAMAGE = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError)
_EXPECTED = "data as uint8 (n, 3 S S) or (n, H, W, 3), and maybe labels as integers (n,)"


def has_arrays(listing: Listing) -> bool:
    """True if a folder holds .npz files, and neither images nor folders."""
    return not listing.folders and not listing.paths(*PICTURES) and bool(_arrays(listing))


def images_in_folder_of_arrays(search: Search, listing: Listing) -> Images:
    """The images of the .npz files of a folder, of one split."""
    names = _arrays(listing)
    search.ignored.update(extension_of(name) for name in listing.files if name not in names)
    yield from images_in_split(search, listing, names, _split_of, _images_in_arrays_of)


def _images_in_arrays_of(search: Search, listing: Listing, name: str) -> Images:
    yield from images_in_arrays(search, listing.folder / name)


def images_in_arrays(search: Search, path: Path) -> Images:
    """The images of one .npz file. If it is compressed, they are inflated in order, see `array_rows`."""
    with data_error(f"{path}: cannot be read as arrays", "copy it again", _DAMAGE), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if "data.npy" not in names:
        raise DataError(f"{path}: holds {', '.join(names[:5])}, no data.npy; write {_EXPECTED}")
    with data_error(f"{path}: cannot be read as arrays", "copy it again", _DAMAGE), zipfile.ZipFile(path) as archive:
        header, info = header_of(archive), archive.getinfo("data.npy")
        start = offset_of(path, info, header)
        given = np.load(archive.open("labels.npy"), allow_pickle=False) if "labels.npy" in names else None
    if not header.is_images:
        order = " in column order" if header.column_major else ""
        raise DataError(f"{path}: data is {header.dtype} {header.shape}{order}; write {_EXPECTED}")
    is_stored = info.compress_type == zipfile.ZIP_STORED and header.has_planes
    if is_stored and info.file_size < header.size + header.count * header.row_bytes:
        raise DataError(f"{path}: data has fewer bytes than its {header.count} images take; copy it again")
    storage, group = (Storage.PLANES, NO_GROUP) if is_stored else (Storage.ARRAY, search.new_group())
    for row, label in enumerate(_labels(search, path, header, given)):
        offset = start + row * header.row_bytes if is_stored else row
        yield Found(str(path), "npy", label, f"{path}: row {row}", offset, header.row_bytes, storage, group)


def _arrays(listing: Listing) -> list[str]:
    names = [name for name in listing.files if extension_of(name) == "npz"]
    return [name for name in names if is_kind(listing.folder / name, Kind.NPZ)]


def _split_of(name: str) -> str:
    return next((split for split in ("train", "val", "test") if name.startswith(split)), "")


def _labels(
    search: Search, path: Path, header: ArrayHeader, given: npt.NDArray[np.generic] | None
) -> Iterator[Label] | Sequence[Label]:
    """The label of each image."""
    if search.without_labels():
        return [None] * header.count
    if given is None:
        what = "holds no labels, like the older ImageNet-32 and 64, whose pixels differ"
        raise DataError(f"{path}: {what}; pass --labels none to use its images without labels")
    if given.shape != (header.count,) or not np.issubdtype(given.dtype, np.integer):
        raise DataError(f"{path}: labels are {given.dtype} {given.shape} for {header.count} images; write {_EXPECTED}")
    labels: list[int] = given.tolist()
    least, most = min(labels, default=0), max(labels, default=0)
    if least < 0:
        raise DataError(f"{path}: has the label {least}; write labels from 0, or pass --labels none")
    if least == 0 or not header.has_planes:
        return labels
    table = search.option("ground_truth")
    if table is None:
        what = f"labels are {least} to {most}; in ImageNet-32 and 64 these are the devkit's IDs, 1 to {CLASSES}"
        remedy = "pass --ground-truth map_clsloc.txt, or --labels none for no labels"
        raise DataError(f"{path}: {what}, which are not in the order of sorted WNIDs; {remedy}")
    wnids = wnids_of_ids(Path(table))
    if most > len(wnids):
        raise DataError(f"{path}: has the label {most}, but {table} has the IDs 1..{len(wnids)}; pass the right table")
    search.name_classes(sorted(wnids.values()), table)
    return map(wnids.__getitem__, labels)
