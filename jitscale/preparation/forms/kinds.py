"""What a file is, by its first bytes; its name only helps. What is not read is refused with its remedy."""

from enum import Enum, auto
from pathlib import Path

from jitscale.errors import DataError, data_error
from jitscale.preparation.forms.search import FORMS_REMEDY

_HEAD = 512  # bytes that tell every kind
_USTAR = 257  # byte where a tar's magic stands


class Kind(Enum):
    """The kinds of files that hold images."""

    TAR = auto()
    ZIP = auto()  # also .npz
    PARQUET = auto()
    ARROW_STREAM = auto()
    ARROW_FILE = auto()  # with a footer; also .feather
    TABLE = auto()  # .csv, .jsonl
    CIFAR = auto()


_MAGIC = {
    b"PK\x03\x04": Kind.ZIP,
    b"PAR1": Kind.PARQUET,
    b"\xff\xff\xff\xff": Kind.ARROW_STREAM,
    b"ARROW1": Kind.ARROW_FILE,
}
# Kinds that are refused: how their bytes begin, what they are, the remedy.
_REFUSED = [
    (b"\x1f\x8b", "is compressed with gzip", "gunzip it: images are read by offset"),
    (b"BZh", "is compressed with bzip2", "bunzip2 it: images are read by offset"),
    (b"\xfd7zXZ\0", "is compressed with xz", "unxz it: images are read by offset"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd", "unzstd it: images are read by offset"),
]


def kind_of(path: Path) -> Kind:
    """What the file `path` is. Raises a DataError if it cannot be read, or is of a kind that is not read."""
    with data_error(f"{path}: cannot be read", "correct the path or mend the storage"), path.open("rb") as file:
        head = file.read(_HEAD)
    for magic, what, remedy in _REFUSED:
        if head.startswith(magic):
            raise DataError(f"{path}: {what}; {remedy}")
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return kind
    suffix = path.suffix.lower()
    if suffix == ".tar" or head[_USTAR : _USTAR + 5] == b"ustar":
        return Kind.TAR  # a damaged one is met when it is read
    if suffix in (".csv", ".jsonl"):
        return Kind.TABLE
    raise DataError(f"{path}: is neither a folder, a .tar, a .csv nor a .jsonl; {FORMS_REMEDY}")
