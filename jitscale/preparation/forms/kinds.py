"""The kind of a file, by its first bytes; its name only helps. Other kinds are refused, with a remedy."""

import os
from enum import Enum, auto
from itertools import chain, islice
from pathlib import Path

from jitscale.errors import DataError, data_error
from jitscale.preparation.forms.search import FORMS_REMEDY

LFS_POINTER = b"version https://git-lfs"

_HEAD = 512  # bytes; enough to recognise every kind
_USTAR = 257  # byte where a tar's magic stands
_ZIP_NAME = 30  # byte where the name of a zip's first member stands
CIFAR_RECORDS = (3073, 3074)  # bytes: one or two labels, and 32 x 32 pixels
_FILES_LOOKED_AT = 1000  # files of a folder without images


class Kind(Enum):
    """The kinds of files that hold images."""

    TAR = auto()
    ZIP = auto()
    NPZ = auto()  # a zip of numpy arrays
    PARQUET = auto()
    ARROW_STREAM = auto()
    ARROW_FILE = auto()  # with a footer; also .feather
    TABLE = auto()  # .csv, .jsonl
    CIFAR = auto()


_BY_OFFSET = "images are read by offset"
_ONE_PICTURE = ("is one picture", "give its folder")
_AS_ARRAYS = "load its images and write them with numpy.savez('images.npz', data=..., labels=...), or as files"
_MAGIC = {
    b"PK\x03\x04": Kind.ZIP,
    b"PAR1": Kind.PARQUET,
    b"\xff\xff\xff\xff": Kind.ARROW_STREAM,
    b"ARROW1": Kind.ARROW_FILE,
}
# Kinds that are refused: how their bytes begin, what they are, the remedy.
_REFUSED = [
    (b"\x1f\x8b", "is compressed with gzip", f"gunzip it: {_BY_OFFSET}"),
    (b"BZh", "is compressed with bzip2", f"bunzip2 it: {_BY_OFFSET}"),
    (b"\xfd7zXZ\0", "is compressed with xz", f"unxz it: {_BY_OFFSET}"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd", f"unzstd it: {_BY_OFFSET}"),
    (b"\x04\x22\x4d\x18", "is compressed with lz4", f"unlz4 it: {_BY_OFFSET}"),
    (b"Rar!\x1a\x07", "is a rar archive", "unpack it and give the folder"),
    (b"7z\xbc\xaf\x27\x1c", "is a 7z archive", "unpack it and give the folder"),
    (b"\x89HDF\r\n\x1a\n", "is an HDF5 file, which is not read", _AS_ARRAYS),
    (b"MATLAB ", "is a MATLAB file, which is not read", _AS_ARRAYS),
    (b"\x93NUMPY", "is one numpy array", "write it with its labels as numpy.savez('images.npz', data=..., labels=...)"),
    (b"<!DOCTYPE html", "is a web page, not the data", "download it again; the site may want a login"),
    (b"<html", "is a web page, not the data", "download it again; the site may want a login"),
    *((magic, *_ONE_PICTURE) for magic in (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"II*\0", b"MM\0*")),
]
_PICKLES = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))
# Known pickles by name, and the remedy for each.
_KNOWN_PICKLES = {
    ("data_batch", "test_batch", "batches.meta"): "give CIFAR-10's binary version, cifar-10-batches-bin",
    ("train_data_batch", "val_data"): "give the .npz files of ImageNet-32 or 64",
    ("train", "test", "meta"): "give CIFAR-100's binary version, cifar-100-binary",
}
_LMDB = (16, b"\xde\xc0\xef\xbe")  # byte where its magic stands


def kind_of(path: Path) -> Kind:
    """The kind of the file `path`. Raises a DataError if it cannot be read, or is of a kind that is refused."""
    kind = _kind_by(path, head := _head_of(path))
    if kind is None:
        _refuse(path, head)
        raise DataError(
            f"{path}: is neither a folder, a .tar, a .parquet, a .csv nor a .jsonl by its first bytes; {FORMS_REMEDY}"
        )
    return kind


def is_kind(path: Path, kind: Kind) -> bool:
    """True if the file `path` is of this kind. Raises a DataError if it cannot be read."""
    return path.is_file() and _kind_by(path, _head_of(path)) == kind


def _kind_by(path: Path, head: bytes) -> Kind | None:
    """The kind of a file that begins with `head`; None if it is refused or unknown."""
    if head[_USTAR : _USTAR + 5] == b"ustar":
        return Kind.TAR  # if it is damaged, reading it says so
    if _refusal(path, head):
        return None
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return Kind.NPZ if kind == Kind.ZIP and _is_npz(path, head) else kind
    suffix = path.suffix.lower()
    if suffix == ".tar":
        return Kind.TAR
    if suffix in (".csv", ".jsonl"):
        return Kind.TABLE
    size = path.stat().st_size
    if suffix == ".bin" and size and any(size % record == 0 for record in CIFAR_RECORDS):
        return Kind.CIFAR
    return None


def refuse_unread_files(folder: Path) -> None:
    """Raise a DataError if `folder`, where no image was found, holds a file of a kind that is refused."""
    files = chain.from_iterable(
        (Path(parent, name) for name in sorted(names)) for parent, _, names in os.walk(folder, followlinks=False)
    )
    for path in islice(files, _FILES_LOOKED_AT):
        if path.is_file():
            _refuse(path, _head_of(path))


def _head_of(path: Path) -> bytes:
    with data_error(f"{path}: cannot be read", "correct the path or repair the storage"), path.open("rb") as file:
        return file.read(_HEAD)


def _refuse(path: Path, head: bytes) -> None:
    """Raise a DataError if a file that begins with `head` is of a kind that is refused."""
    if refusal := _refusal(path, head):
        raise DataError(f"{path}: {refusal}")


def _refusal(path: Path, head: bytes) -> str:
    """A message with the remedy, if a file that begins with `head` is of a kind that is refused; else empty."""
    for magic, what, remedy in _REFUSED:
        if head.startswith(magic):
            return f"{what}; {remedy}"
    if (head.startswith(b"RIFF") and head[8:12] == b"WEBP") or (head.startswith(b"BM") and head[6:10] == bytes(4)):
        return "; ".join(_ONE_PICTURE)
    if head.startswith(LFS_POINTER):
        return f"is a git-lfs pointer of {len(head)} bytes, not the data; run git lfs pull"
    if head.startswith(_PICKLES):
        stem = path.name.rstrip("0123456789").rstrip("_")
        known = [remedy for names, remedy in _KNOWN_PICKLES.items() if stem in names]
        remedy = known[0] if known else _AS_ARRAYS
        return f"is a pickle, which can run any code and is never opened; {remedy}"
    if head.startswith(b"PK\x03\x04") and _first_member(head).endswith(b"/data.pkl"):
        return f"is a file of PyTorch, a pickle, which is never opened; {_AS_ARRAYS}"
    if head[_LMDB[0] :].startswith(_LMDB[1]):
        remedy = "export its images with fyu/lsun's data.py export --flat, and give a folder of a folder for each class"
        return f"is an LMDB database, as LSUN has them, which is not read; {remedy}"
    if _is_tfrecord(head):
        remedy = "write its images as files, or as webdataset tars"
        return f"is a TFRecord file, which is not read; {remedy}"
    return ""


def _first_member(head: bytes) -> bytes:
    """The name of a zip's first member."""
    return head[_ZIP_NAME : _ZIP_NAME + int.from_bytes(head[26:28], "little")]


def _is_npz(path: Path, head: bytes) -> bool:
    """True if a zip holds arrays. Images in a zip may be .npy files too, but none of them is called data."""
    name = _first_member(head)
    return name.endswith(b".npy") and b"/" not in name and (path.suffix.lower() == ".npz" or name == b"data.npy")


def _is_tfrecord(head: bytes) -> bool:
    """True if the file begins with a length of 8 bytes and the masked CRC-32C of that length."""
    crc = 0xFFFFFFFF
    for byte in head[:8]:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    return len(head) >= 12 and head[8:12] == masked.to_bytes(4, "little")
