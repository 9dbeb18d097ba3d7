"""The index of one tar: where its images lie, and the labels, from a scan of the headers."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from jitscale.data.images import EXTENSIONS
from jitscale.errors import DataError

IndexArray = npt.NDArray[np.void]

# 20 bytes a sample: an index of 100 million images takes 2 GB, on disk.
INDEX = np.dtype([("offset", "<i8"), ("size", "<u4"), ("label", "<i4"), ("extension", "S4")])
NO_LABEL = -1
LARGEST_LABEL = int(np.iinfo(np.int32).max)

_END_OF_ARCHIVE = bytes(1024)  # POSIX.1-2001, pax: two blocks of zeros
_GZIP_MAGIC = b"\x1f\x8b"


def index_tar(path: Path, *, with_labels: bool = True) -> IndexArray:
    """Scan the headers of one tar; one `INDEX` record a sample, in the order of the tar.

    Members belong to one sample as webdataset groups them: neighbours with the same name up to the first dot of the
    base name. One of them is the image; `cls` is the label; others are ignored. Without `with_labels`, and where a
    sample has no `cls` member, the label is `NO_LABEL`.

    Raises:
        DataError: the tar is missing, empty, compressed, truncated or damaged; a key comes twice; a sample has no
            image or several; a label is no class number.
    """
    members = _members_by_key(path)
    index = np.empty(len(members), INDEX)
    with path.open("rb") as file:
        for number, (key, parts) in enumerate(members.items()):
            found = [extension for extension in parts if extension in EXTENSIONS]
            if len(found) != 1:
                start = min(part.offset for part in parts.values())
                raise DataError(
                    f"{path}: byte {start}: sample {key!r} has {len(found)} images among {sorted(parts)}, needs "
                    f"exactly one of {', '.join(EXTENSIONS)}; remove it or write the shard again"
                )
            image = parts[found[0]]
            label = _read_label(path, file, parts["cls"]) if with_labels and "cls" in parts else NO_LABEL
            index[number] = (image.offset_data, image.size, label, found[0].encode())
    return index


def _members_by_key(path: Path) -> dict[str, dict[str, tarfile.TarInfo]]:
    """The regular members of a whole tar: key to extension to member."""
    members: dict[str, dict[str, tarfile.TarInfo]] = {}
    previous = None
    try:
        with path.open("rb") as file:
            magic = file.read(len(_GZIP_MAGIC))
            if not magic:
                raise DataError(f"{path}: is empty (0 bytes); copy or write it again")
            if magic == _GZIP_MAGIC:
                raise DataError(f"{path}: byte 0: is compressed with gzip and cannot be read by offset; gunzip it")
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    key, extension = _split_name(member.name)
                    if not member.isreg() or not key:
                        continue
                    parts = members.setdefault(key, {})
                    if extension in parts or (parts and key != previous):
                        raise DataError(
                            f"{path}: byte {member.offset}: key {key!r} comes twice; every sample needs a key of its "
                            "own, write the shard again"
                        )
                    parts[extension] = member
                    previous = key
                _check_end(path, file, tar.offset)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}); correct data.shards") from error
    except tarfile.TarError as error:
        size = path.stat().st_size
        raise DataError(
            f"{path}: is no whole tar ({error}; it ends at byte {size}, without an end-of-archive block); "
            "copy or write it again"
        ) from error
    return members


def _check_end(path: Path, file: IO[bytes], offset: int) -> None:
    """tarfile stops silently at what is not a header; only the end-of-archive blocks may stand there."""
    found = os.pread(file.fileno(), len(_END_OF_ARCHIVE), offset)
    if len(found) < len(_END_OF_ARCHIVE):
        raise DataError(
            f"{path}: ends at byte {offset + len(found)} without an end-of-archive block of "
            f"{len(_END_OF_ARCHIVE)} zeros: it was truncated; copy or write it again"
        )
    if found != _END_OF_ARCHIVE:
        raise DataError(
            f"{path}: byte {offset}: neither a tar header nor the end-of-archive block; copy or write it again"
        )


def _split_name(name: str) -> tuple[str, str]:
    """webdataset's rule: `a/b.seg.PNG` is extension `seg.png` of key `a/b`. Hidden files belong to no key."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and dot else ("", "")


def _read_label(path: Path, file: IO[bytes], member: tarfile.TarInfo) -> int:
    text = os.pread(file.fileno(), min(member.size, 32), member.offset_data)
    try:
        label = int(text)
    except ValueError:
        label = NO_LABEL
    if not 0 <= label <= LARGEST_LABEL:
        raise DataError(
            f"{path}: byte {member.offset_data}: {member.name} holds {text!r}, not an integer in 0..{LARGEST_LABEL}; "
            "write the class number in decimal"
        )
    return label
