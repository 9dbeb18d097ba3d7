"""The index of one tar: the places of its images, and the labels, from a scan of the headers.

The index of `shard.tar` is the file `shard.index.npy` next to it, which is memory-mapped. `shard.keys.npy` has a hash
of each sample's key, in the same order. Only a run that holds out a fraction of the samples reads it.
"""

import hashlib
import io
import logging
import os
import tarfile
import threading
import tokenize
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, cast

import numpy as np
import numpy.typing as npt

from jitscale.data.images import EXTENSIONS
from jitscale.data.tar_labels import CLS, LabelError, LabelKey
from jitscale.data.tar_members import LOST_LINK, SPARSE, contents, split_name, unread_labels
from jitscale.errors import DataError, StorageError, data_error
from jitscale.files import atomic_write
from jitscale.keyed_random import UInt64Array

logger = logging.getLogger(__name__)

IndexArray = npt.NDArray[np.void]

# 20 bytes per sample: an index of 100 million images takes 2 GB on disk.
INDEX = np.dtype([("offset", "<i8"), ("size", "<u4"), ("label", "<i4"), ("extension", "S4")])
NO_LABEL = -1
LARGEST_LABEL = int(np.iinfo(np.int32).max)

_END_OF_ARCHIVE = bytes(2 * tarfile.BLOCKSIZE)  # POSIX.1-2001, pax: two blocks of zeros
_CHUNK = 1 << 20  # bytes per read after the end of the archive, where usually less than 10 KiB are
_GZIP_MAGIC = b"\x1f\x8b"
_LONGEST_LABEL = 256  # bytes of a class name
# numpy parses a header with Python's parser, which miscounts its depth in several threads (CPython 3.11, gh-106905).
_PARSING = threading.Lock()
_LONGEST_JSON = 1 << 24  # bytes
# Errors of numpy for a damaged .npy, whose header it parses as Python.
_DAMAGED_NPY = (
    *(OSError, ValueError, EOFError, TypeError, OverflowError, SyntaxError, tokenize.TokenError),
    *(SystemError, MemoryError, RecursionError),  # if brackets are nested too deeply
)


@dataclass(frozen=True)
class TarSample:
    """One sample of a tar, from its headers."""

    key: str
    offset: int  # offset of the image's bytes in the tar
    size: int
    extension: str
    label: str | None  # the text of its `cls` member or of another `LabelKey`; None without a label
    label_offset: int


class ShortReadError(OSError):
    """A file ends before the requested bytes."""


class OffsetReader:
    """A file that is read by offset. It is opened from a path or a descriptor, and closed with its last reference."""

    def __init__(self, file: str | Path | int) -> None:
        # Without O_NONBLOCK, opening a pipe that has no writer would block.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
        self._descriptor = file if isinstance(file, int) else os.open(file, flags)

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on. Raises a `ShortReadError` if the file ends earlier.

        pread does not move the file position, so forked processes can share the file.
        """
        data = os.pread(self._descriptor, size, offset)
        if len(data) < size:
            raise ShortReadError(f"ends after {len(data)} of {size} bytes")
        return data

    def status(self) -> os.stat_result:
        """The status of the file (fstat)."""
        return os.fstat(self._descriptor)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


@dataclass(frozen=True)
class Defect:
    """One fault of a shard."""

    path: Path
    byte: int | None  # byte in the tar; None: the file as a whole
    what: str  # the fault and the remedy, in one line

    def __str__(self) -> str:
        return f"{self.path}: {'' if self.byte is None else f'byte {self.byte}: '}{self.what}"


@dataclass
class TarScan:
    """The result of a scan of one tar's headers."""

    path: Path
    samples: list[TarSample] = field(default_factory=list)  # the sound ones, in the order of the tar
    defects: list[Defect] = field(default_factory=list)
    complete: bool = False  # reached the end of the archive; otherwise the last defect tells where the scan stopped
    skipped: Counter[str] = field(default_factory=Counter)  # members without a sample, by kind; folders are not counted
    failure: OSError | None = None  # the error, if the tar cannot be read (the last defect)
    unread_labels: str = ""  # if no sample has a label: possible labels, and the remedy

    def refuse(self, byte: int | None, what: str) -> None:
        """Add a `Defect`."""
        self.defects.append(Defect(self.path, byte, what))


def scan_tar(path: Path, key: LabelKey = CLS) -> list[TarSample]:
    """The samples of one tar in its order; `key` is the location of their labels.

    Members are grouped as in webdataset: a sample is a run of members with the same name up to the first dot of the
    base name. One of them is the image, and `cls` is the label. Other members are ignored, and so are keys that have
    neither. A link stands for an earlier member of the tar; a link without its target is left out, with a warning.
    Raises a DataError if the tar is empty, compressed, truncated or damaged, if a key occurs twice, if a sample has no
    image or several, or if its image or label is sparse; a StorageError if it cannot be read.
    """
    scan = sound_scan(path, key)
    if lost := sum(number for kind, number in scan.skipped.items() if kind.endswith(LOST_LINK)):
        logger.warning("%s: %d images or labels are links without a target; they are left out", path, lost)
    return scan.samples


def sound_scan(path: Path, key: LabelKey = CLS) -> TarScan:
    """`survey_tar`, but it raises as `scan_tar` does."""
    scan = survey_tar(path, key)
    if scan.failure is not None:
        raise StorageError.of(scan.failure, str(scan.defects[-1]))
    if scan.defects:
        raise DataError(str(scan.defects[0]))
    return scan


def survey_tar(path: Path, key: LabelKey = CLS) -> TarScan:
    """As `scan_tar`, but continue after a defect as far as possible, and list all defects."""
    scan = TarScan(path)
    try:
        with path.open("rb") as file:
            members = _read_members(scan, file)
            for name, parts in members.items():
                _add_sample(scan, file, name, parts, key)
            if key == CLS and scan.samples and all(sample.label is None for sample in scan.samples):
                scan.unread_labels = unread_labels(file, members, {one.key: None for one in scan.samples})
    except OSError as error:
        scan.refuse(None, f"cannot be read ({error}); correct the path or repair the storage")
        scan.complete, scan.failure = False, error
    return scan


def _add_sample(
    scan: TarScan, file: IO[bytes], key: str, parts: dict[str, tarfile.TarInfo], label_key: LabelKey
) -> None:
    """Add the sample of a key, or its defect; or count its members as skipped if they are not a sample."""
    found = [extension for extension in parts if extension in EXTENSIONS]
    dotted = [extension for extension in parts if extension.rpartition(".")[2] in EXTENSIONS]
    if not found and "cls" not in parts and not dotted:
        scan.skipped.update(parts.keys())
        return
    if len(found) != 1:
        what = f"sample {key!r} has {len(found)} images among {sorted(parts)}"
        remedy = f"needs exactly one of {', '.join(EXTENSIONS)}; remove it or write the shard again"
        if not found and dotted:
            remedy = f"an extension starts at the first dot of a name: write {key}_{dotted[0]} for {key}.{dotted[0]}"
        scan.refuse(min(part.offset for part in parts.values()), f"{what}, {remedy}")
        return
    image, label, label_offset = parts[found[0]], None, 0
    holder, name = label_key.extension, f"{key}.{label_key.extension}"
    if holder in parts:
        label_offset = parts[holder].offset_data
        size = min(parts[holder].size, _LONGEST_JSON if label_key.fields else _LONGEST_LABEL)
        text = os.pread(file.fileno(), size, label_offset).decode(errors="replace")
        try:
            label = label_key.label(name, text)
        except LabelError as error:
            scan.refuse(parts[holder].offset, str(error))
            return
    elif label_key.fields:
        what = f"sample {key!r} has no {name}, and --label-key {label_key} needs it; write the shard again"
        scan.refuse(image.offset, what)
        return
    scan.skipped.update(extension for extension in parts if extension not in (holder, found[0]))
    scan.samples.append(TarSample(key, image.offset_data, image.size, found[0], label, label_offset))


def index_tar(path: Path, key: LabelKey = CLS, class_names: list[str] | None = None) -> IndexArray:
    """One `INDEX` record for each sample that `scan_tar` finds.

    A sample without a label gets `NO_LABEL`. Raises as `scan_tar`. Raises a DataError if a label is neither a class
    number in decimal nor one of `class_names`.
    """
    samples, labels = scan_tar(path, key), []
    numbers = {name: number for number, name in enumerate(class_names or [])}
    for sample in samples:
        label = NO_LABEL if sample.label is None else class_number(sample.label, numbers)
        if label is None:
            holds = f"{sample.key}.{key.extension} holds {sample.label!r}"
            what = f"{holds}, neither an integer in 0..{LARGEST_LABEL} nor a known class name"
            remedy = "write the class number in decimal, or name the classes with tools/index_shards.py"
            raise DataError(f"{path}: byte {sample.label_offset}: {what}; {remedy}")
        labels.append(label)
    return index_of(samples, labels)


def index_of(samples: Sequence[TarSample], labels: Sequence[int]) -> IndexArray:
    """`samples` with the class numbers `labels`, as `INDEX` records."""
    rows = zip(samples, labels, strict=True)
    return np.array([(one.offset, one.size, label, one.extension.encode()) for one, label in rows], INDEX)


def class_number(text: str, numbers: dict[str, int]) -> int | None:
    """The class number for `text`: a number in decimal, or a name in `numbers`. None for other text."""
    if text.isascii() and text.isdigit():
        digits = text.lstrip("0") or "0"  # Python refuses to parse thousands of digits
        return int(digits) if len(digits) <= len(str(LARGEST_LABEL)) and int(digits) <= LARGEST_LABEL else None
    return numbers.get(text)


def index_path(tar: Path) -> Path:
    """The path of the index of `tar`."""
    return tar.with_suffix(".index.npy")


def keys_path(tar: Path) -> Path:
    """The path of the hashes of the keys of `tar`."""
    return tar.with_suffix(".keys.npy")


def save_array(path: Path, array: IndexArray | UInt64Array) -> None:
    """Write an index, or hashes of keys, to the file `path`."""
    with atomic_write(path) as file:
        np.save(file, array, allow_pickle=False)


def count_classes(indices: Iterable[IndexArray], num_classes: int) -> list[int] | None:
    """Samples of each class, from the labels of all `indices`; None if there are no classes."""
    if num_classes == 0:
        return None
    counts = np.zeros(num_classes, np.int64)
    for index in indices:
        labels = index["label"]
        counts += np.bincount(labels[(labels >= 0) & (labels < num_classes)], minlength=num_classes)
    return cast(list[int], counts.tolist())


def map_index(path: Path) -> IndexArray:
    """The index in the file `path`, memory-mapped: for 100 million samples, each worker would need 2 GB for a copy.

    Raises a DataError if it is missing or damaged.
    """
    remedy = "remove it, then the tar is scanned"
    with data_error(f"{path}: cannot be mapped", remedy, _DAMAGED_NPY):
        index = np.lib.format.open_memmap(path, mode="r")  # np.load could take the file for a zip
    if index.dtype != INDEX or index.ndim != 1:
        raise DataError(f"{path}: holds {index.dtype} {index.shape}, not an index; {remedy}")
    return np.asarray(index)  # a view of the same map: indexing of np.memmap is several times slower


def key_hashes(samples: Sequence[TarSample]) -> UInt64Array:
    """The first 8 bytes of the BLAKE2b hash of each sample's key, (samples,). They do not depend on the tar."""
    names = (sample.key.encode(errors="surrogateescape") for sample in samples)
    digests = b"".join(hashlib.blake2b(name, digest_size=8).digest() for name in names)
    return np.frombuffer(digests, "<u8").astype(np.uint64)


def parse_keys(content: bytes, source: str, samples: int) -> UInt64Array:
    """The hashes of `samples` keys in the `content` of their file; `source` is its name for messages.

    Raises a DataError if it is damaged, or has another number of samples.
    """
    remedy = "write it again with tools/index_shards.py --force"
    with _PARSING, data_error(f"{source}: cannot be read", remedy, _DAMAGED_NPY):
        keys = np.load(io.BytesIO(content), allow_pickle=False)
    if keys.dtype != np.uint64 or keys.shape != (samples,):
        raise DataError(f"{source}: holds {keys.dtype} {keys.shape}, not the keys of {samples} samples; {remedy}")
    return keys


def _read_members(scan: TarScan, file: IO[bytes]) -> dict[str, dict[str, tarfile.TarInfo]]:
    """Members with content, by key and extension; fills `defects`, `complete` and `skipped` of the scan.

    A link is replaced by its target. If the tar is truncated, the last key is left out, because some of its members may
    be lost.
    """
    members: dict[str, dict[str, tarfile.TarInfo]] = {}
    magic = file.read(len(_GZIP_MAGIC))
    if not magic:
        scan.refuse(None, "is empty (0 bytes); copy or write it again")
        return members
    if magic == _GZIP_MAGIC:
        scan.refuse(0, "is compressed with gzip and cannot be read by offset; gunzip it")
        return members
    file.seek(0)
    previous, start = "", 0
    repeated: set[str] = set()
    lost: list[tuple[str, str]] = []  # key and extension of images and labels that are links without a target
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member, content in contents(tar):
                start = member.offset
                key, extension = split_name(member.name)
                is_read = extension in EXTENSIONS or extension == "cls"
                if not key or content is None:
                    scan.skipped[extension + (LOST_LINK if is_read else "")] += 1
                    if is_read:
                        lost.append((key, extension))
                    continue
                if content.issparse() and is_read:
                    scan.refuse(start, f"{member.name!r} {SPARSE}")
                parts = members.setdefault(key, {})
                if extension not in parts and (not parts or key == previous):
                    parts[extension] = content
                elif key not in repeated:
                    what = f"key {key!r} occurs twice; every sample needs its own key, write the shard again"
                    scan.refuse(start, what)
                    repeated.add(key)
                previous = key
            broken = wrong_end(scan.path, file, tar.offset)
    except (tarfile.TarError, ValueError) as error:  # ValueError comes from numbers in pax headers
        end = f"it ends at byte {scan.path.stat().st_size}, without an end-of-archive block"
        broken = Defect(scan.path, start, f"is not a complete tar ({error}; {end}); copy or write it again")
    if broken is not None:
        scan.defects.append(broken)
        members.pop(previous, None)
    scan.complete = broken is None
    for key, extension in lost:
        parts = members.get(key, {})
        if not any(part in EXTENSIONS for part in parts):
            scan.skipped.update(members.pop(key, {}).keys())
        elif extension == "cls":  # a pass in tar order would read the image although the sample is left out
            at = min(part.offset for part in parts.values())
            scan.refuse(at, f"sample {key!r} has a label that is a link without a target; write the shard again")
            del members[key]
    return members


def wrong_end(path: Path, file: IO[bytes], offset: int, end: int | None = None) -> Defect | None:
    """The defect at the end of a tar, if there is one. tarfile stops silently at bytes that are not a header.

    `offset` is the place in `file` at which tarfile stopped. There, only end-of-archive blocks are allowed. The tar
    ends at `end`, or with the file. `path` is for the message.
    """
    descriptor = file.fileno()
    end = os.fstat(descriptor).st_size if end is None else end
    found = os.pread(descriptor, max(min(len(_END_OF_ARCHIVE), end - offset), 0), offset)
    at = offset + len(found)
    if len(found) < len(_END_OF_ARCHIVE):
        blocks = f"an end-of-archive block of {len(_END_OF_ARCHIVE)} zeros"
        return Defect(path, None, f"ends at byte {at} without {blocks}: it was truncated; copy or write it again")
    if found != _END_OF_ARCHIVE:
        return Defect(path, offset, "is neither a tar header nor the end-of-archive block; copy or write it again")
    while chunk := os.pread(descriptor, min(_CHUNK, end - at), at):
        if chunk.count(0) < len(chunk):
            what = "data after the end-of-archive block, perhaps an appended second tar"
            return Defect(path, at, f"{what}; it would not be read: write the two as separate shards")
        at += len(chunk)
    return None
