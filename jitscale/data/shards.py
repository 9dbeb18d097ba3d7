"""Shards: ordinary webdataset tars, written whole, checked before training, read by index; and the order of an epoch.

    shard-000000.tar         members KEY.png (or .webp, .npy) and KEY.cls (the label in decimal)
    shard-000000.index.npy   where the images lie in it, one `INDEX` record a sample, to be memory-mapped
    ...
    manifest.json            what belongs together; written last, so that a folder without it was not finished

webdataset reads these tars, and tars that webdataset wrote are read here, after a scan of their headers. Only reading
by index and the order are our own: webdataset's pipeline can neither resume exactly nor change its number of readers.

Letters: N samples of an epoch, C canonical streams.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import resource
import tarfile
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
import numpy.typing as npt
from braceexpand import braceexpand
from webdataset.writer import TarWriter

from jitscale.data.images import CODECS, EXTENSIONS, UInt8Array, center_crop, decode, encode
from jitscale.errors import DataError
from jitscale.keyed_random import Int64Array, Purpose, hash64, permutation

logger = logging.getLogger(__name__)

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

IndexArray = npt.NDArray[np.void]

# 20 bytes a sample: an index of 100 million images takes 2 GB, on disk.
INDEX = np.dtype([("offset", "<i8"), ("size", "<u4"), ("label", "<i4"), ("extension", "S4")])
MANIFEST = "manifest.json"
NO_LABEL = -1

_END_OF_ARCHIVE = bytes(1024)  # POSIX.1-2001, pax: two blocks of zeros
_GZIP_MAGIC = b"\x1f\x8b"
_LARGEST_LABEL = np.iinfo(np.int32).max


@dataclass(frozen=True)
class ShardRecord:
    """One shard, as the manifest knows it."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds."""

    codec: str
    resolution: int  # pixels a side
    class_names: list[str] | None
    total: int  # samples
    shards: list[ShardRecord]

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """The manifest in the file `path`.

        Raises:
            DataError: it is missing or damaged.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            shards = [ShardRecord(**record) for record in values.pop("shards")]
            return cls(shards=shards, **values)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{path}: cannot be read as a manifest ({error}); write the shards again") from error


def write_shards(
    images: Sequence[UInt8Array] | UInt8Array,
    labels: Sequence[int] | Int64Array,
    output: str | Path,
    *,
    codec: str = "png",
    samples_per_shard: int = 1000,
    class_names: list[str] | None = None,
    seed: int = 0,
) -> Manifest:
    """Write `images` in a random order as shards, their indices and a manifest. Equal input gives equal bytes.

    Args:
        images: anything with a length that yields uint8 (R, R, 3) by integer index, all of one resolution R.
        labels: one class an image, counted from 0.
        output: a folder; made if it is not there.
        codec: the stored form, one of `CODECS`.
        samples_per_shard: samples of every shard but the last.
        class_names: the names of the classes, recorded in the manifest.
        seed: of the order. Keys remain the indices into `images`.

    Raises:
        DataError: input that does not fit together, or a folder that already holds a manifest.
    """
    folder = Path(output)
    if (folder / MANIFEST).exists():
        raise DataError(f"{folder / MANIFEST}: the folder holds shards already; remove it or choose another output")
    if codec not in CODECS or samples_per_shard < 1:
        raise DataError(
            f"codec {codec!r}, samples_per_shard {samples_per_shard}: choose one of {', '.join(CODECS)}, and at least 1"
        )
    _check_labels(labels, len(images), class_names)
    folder.mkdir(parents=True, exist_ok=True)
    resolution = len(images[0])
    order = permutation(len(images), seed, Purpose.PACKING_ORDER)
    records = []
    for number, first in enumerate(range(0, len(order), samples_per_shard)):
        path = folder / f"shard-{number:06d}.tar"
        with _appearing_whole(path) as file, TarWriter(file, encoder=False, mtime=0) as tar:
            for source in order[first : first + samples_per_shard]:
                image = images[source]
                if image.shape[:2] != (resolution, resolution):
                    raise DataError(
                        f"image {source}: has shape {image.shape}, the first one {images[0].shape}; "
                        "crop all of them to squares of one size"
                    )
                extension, data = encode(image, codec)
                tar.write({"__key__": f"{source:09d}", extension: data, "cls": str(int(labels[source])).encode()})
        index = index_tar(path)
        with _appearing_whole(_index_path(path)) as file:
            np.save(file, index, allow_pickle=False)
        records.append(ShardRecord(path.name, len(index), path.stat().st_size, _sha256(path)))
    manifest = Manifest(codec, resolution, class_names, len(order), records)
    with _appearing_whole(folder / MANIFEST) as file:
        file.write(json.dumps(asdict(manifest), indent=1).encode())
    return manifest


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


class ShardSet:
    """Checked shards whose samples are read by (shard, index) in any process.

    Attributes:
        num_samples: over all shards.
        samples_per_shard: (shards,).
        image_size: pixels a side of the images that `read` returns.
        class_names: from the manifest, or None.
        manifest_hash: sha256 over what identifies the content and its order: name, samples, bytes of every shard, and
            its sha256 where a manifest knows it.
    """

    def __init__(
        self, shards: list[_Shard], num_classes: int, image_size: int | None, class_names: list[str] | None
    ) -> None:
        self._shards = shards
        self._num_classes = num_classes
        self._opened: OrderedDict[int, _OpenShard] = OrderedDict()
        self.samples_per_shard: Int64Array = np.array([shard.samples for shard in shards], np.int64)
        self.num_samples = int(self.samples_per_shard.sum())
        self.class_names = class_names
        identity = [[shard.path.name, shard.samples, shard.bytes, shard.sha256] for shard in shards]
        self.manifest_hash = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        self.image_size = len(self._read(0, 0, image_size)[0])  # a size that does not fit is met now

    @classmethod
    def open(cls, pattern: str | Path, num_classes: int, image_size: int | None = None) -> ShardSet:
        """Find the shards and check them as far as possible without reading the images.

        Args:
            pattern: a folder, a glob, or a brace pattern such as `shard-{000..007}.tar`. A folder's manifest says
                which shards there must be, and vouches for their size and for the index beside them. A tar that
                no manifest names is scanned, since an index of unknown origin may be of another tar.
            num_classes: labels must be below it; 0 for unconditional, where labels are ignored and read as 0.
            image_size: pixels a side; larger images are centre-cropped as they are read. None: that of the first one.

        Raises:
            DataError: the first thing that is wrong, with shard, byte, limit and remedy.
        """
        paths, manifests = _find_shards(str(pattern))
        records = {folder / record.name: record for folder, manifest in manifests.items() for record in manifest.shards}
        names = [manifest.class_names for manifest in manifests.values()]
        if any(other != names[0] for other in names):
            raise DataError(
                f"{pattern}: its folders name different classes; a label must mean one thing, open one folder"
            )
        unindexed = {path for path in paths if path not in records or not _index_path(path).exists()}
        if unindexed:
            logger.info(
                "%s: %d of %d shards have no index; scanning their headers", pattern, len(unindexed), len(paths)
            )
        shards = [_check_shard(path, records.get(path), path in unindexed, num_classes) for path in paths]
        return cls(shards, num_classes, image_size, names[0] if names else None)

    def read(self, shard: int, index: int) -> tuple[UInt8Array, int]:
        """Sample `index` of `shard`: its image, uint8 (image_size, image_size, 3), maybe read-only, and its label.

        Raises:
            DataError: the image cannot be read or decoded, or is smaller than the image size.
        """
        return self._read(shard, index, self.image_size)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_opened": OrderedDict()}  # neither descriptors nor maps travel to another process

    def _read(self, shard: int, index: int, image_size: int | None) -> tuple[UInt8Array, int]:
        opened = _remembered(self._opened, shard, lambda: _OpenShard(self._shards[shard]), _most_open_shards())
        offset, size, label, extension = opened.index[index].item()
        try:
            image = decode(opened.read(offset, size), extension.decode())
            image = center_crop(image, min(image.shape[:2]) if image_size is None else image_size)
        except DataError as error:
            raise DataError(f"{self._shards[shard].path}: byte {offset}: sample {index} {error}") from error
        return image, label if self._num_classes else 0


class EpochOrder:
    """Which sample stands at position p of the endless global sequence, by arithmetic: nothing is iterated or stored.

    Position p is place q = p mod N of epoch p // N, and each epoch is a permutation of the N samples:

    1. The shards are permuted and laid end to end.
    2. The line is cut into C contiguous streams whose lengths differ by at most one, the longer ones first.
    3. Each stream is shuffled inside windows of `window` samples (its last one may be shorter).
    4. Place q is depth q // C of stream q mod C. The last round of an epoch, if not whole, has the longer streams only.

    So C shards are read side by side, each nearly in sequence, and a rank that takes every W-th position stays in C / W
    streams when W divides C. C is `streams`, halved until C is at most the number of shards and an average stream
    fills a window: fewer and longer streams mix better than many that are shorter than a batch. Like the rest of the
    order it depends on the data, `seed`, `streams` and `window` alone, never on ranks, workers or batch size.
    """

    def __init__(
        self, samples_per_shard: Sequence[int] | Int64Array, seed: int, streams: int = 512, window: int = 512
    ) -> None:
        self._samples: Int64Array = np.asarray(samples_per_shard, np.int64)
        self.num_samples = int(self._samples.sum())
        if self.num_samples < 1 or streams < 1 or window < 1:
            raise DataError(
                f"order: {self.num_samples} samples, {streams} streams, window {window}; each must be at least 1"
            )
        while streams > 1 and (streams > len(self._samples) or self.num_samples < streams * window):
            streams //= 2
        self.seed, self.streams, self.window = seed, streams, window
        self._lines: OrderedDict[int, tuple[Int64Array, Int64Array]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], npt.NDArray[np.int32]] = OrderedDict()

    def locate(self, positions: Int64Array) -> tuple[Int64Array, Int64Array]:
        """The shard numbers and the indices inside the shards of `positions` (B,), both (B,)."""
        epochs, places = np.divmod(positions, self.num_samples)
        depths, streams = np.divmod(places, self.streams)
        windows, slots = np.divmod(depths, self.window)
        shards, indices = np.empty_like(positions), np.empty_like(positions)
        for epoch, window in np.unique(np.stack([epochs, windows]), axis=1).T.tolist():
            here = (epochs == epoch) & (windows == window)
            shuffled = self._window_order(epoch, window)[streams[here], slots[here]]
            along = self._stream_starts(streams[here]) + window * self.window + shuffled
            shard_order, starts = self._line(epoch)
            turn = np.searchsorted(starts, along, side="right") - 1
            shards[here], indices[here] = shard_order[turn], along - starts[turn]
        return shards, indices

    def _line(self, epoch: int) -> tuple[Int64Array, Int64Array]:
        """The shards of an epoch in order, and where on the line each starts."""

        def lay() -> tuple[Int64Array, Int64Array]:
            order = permutation(len(self._samples), self.seed, Purpose.SHARD_ORDER, epoch)
            lengths = self._samples[order]
            return order, np.cumsum(lengths) - lengths

        return _remembered(self._lines, epoch, lay, 2)

    def _stream_starts(self, streams: Int64Array) -> Int64Array:
        shortest, longer = divmod(self.num_samples, self.streams)
        return streams * shortest + np.minimum(streams, longer)

    def _window_order(self, epoch: int, window: int) -> npt.NDArray[np.int32]:
        """The order inside one window of every stream: (C, samples of the longest stream's window)."""

        def shuffle() -> npt.NDArray[np.int32]:
            streams = np.arange(self.streams)
            lengths = np.diff(self._stream_starts(np.arange(self.streams + 1))) - window * self.window
            slots = np.arange(min(self.window, int(lengths.max())))
            draws = hash64(self.seed, Purpose.WINDOW_ORDER, epoch, streams[:, None], window, slots)
            draws[slots >= lengths[:, None]] = np.iinfo(np.uint64).max  # stays last: a shorter stream never asks for it
            return np.argsort(draws, axis=1, kind="stable").astype(np.int32)

        return _remembered(self._windows, (epoch, window), shuffle, 3)


@dataclass(frozen=True)
class _Shard:
    path: Path
    samples: int
    bytes: int
    sha256: str | None
    index: IndexArray | None  # None: in the file beside the tar


class _OpenShard:
    """A descriptor and a mapped index, closed with the last reference."""

    def __init__(self, shard: _Shard) -> None:
        self.index = _map_index(shard.path) if shard.index is None else shard.index
        try:
            self._descriptor = os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"{shard.path}: cannot be opened any more ({error}); restore it") from error

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on. pread moves no file position, so that forked processes may share a file.

        Raises:
            DataError: the file system fails, or the file has become shorter.
        """
        try:
            data = os.pread(self._descriptor, size, offset)
        except OSError as error:
            raise DataError(f"cannot be read ({error}); start again when the storage works") from error
        if len(data) < size:
            raise DataError(f"ends after {len(data)} of {size} bytes: the file was cut while in use; copy it again")
        return data

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


def _remembered(cache: OrderedDict[K, V], key: K, compute: Callable[[], V], capacity: int) -> V:
    """`compute()`, from `cache` if it is among the `capacity` most recently used keys."""
    if key not in cache:
        while len(cache) >= capacity:
            cache.popitem(last=False)
        cache[key] = compute()
    cache.move_to_end(key)
    return cache[key]


def _most_open_shards() -> int:
    """A shard holds two descriptors, since Python's mmap keeps one; 256 are left for everything else."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 20 if limit == resource.RLIM_INFINITY else max(16, (limit - 256) // 2)


def _check_labels(labels: Sequence[int] | Int64Array, images: int, class_names: list[str] | None) -> None:
    if images == 0 or images != len(labels):
        raise DataError(f"{images} images and {len(labels)} labels: give one label an image, and at least one image")
    limit = _LARGEST_LABEL if class_names is None else len(class_names) - 1
    for number, label in enumerate(labels):
        if not 0 <= label <= limit:
            raise DataError(f"image {number}: label {label} is not in 0..{limit}; correct it or the class names")


def _find_shards(pattern: str) -> tuple[list[Path], dict[Path, Manifest]]:
    """The tars that `pattern` means, in order, and the manifests of their folders."""
    folder = Path(pattern)
    if folder.is_dir():
        paths = sorted(folder.glob("*.tar"))
    else:
        try:
            names = list(braceexpand(pattern))
        except ValueError as error:
            raise DataError(f"{pattern}: has unbalanced braces; write for example shard-{{000..007}}.tar") from error
        paths = [Path(path) for name in names for path in (sorted(glob.glob(name)) if glob.has_magic(name) else [name])]
    folders = dict.fromkeys([folder] if folder.is_dir() else [path.parent for path in paths])
    manifests = {at: Manifest.read(at / MANIFEST) for at in folders if (at / MANIFEST).exists()}
    if folder in manifests:
        paths = [folder / record.name for record in manifests[folder].shards]
    if not paths:
        raise DataError(f"{pattern}: no tar shards here; correct data.shards or write them")
    if len(set(paths)) < len(paths):
        raise DataError(f"{pattern}: names a shard twice; every sample must come once an epoch")
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise DataError(
            f"{missing[0]}: missing ({len(missing)} of {len(paths)} shards are); copy it again or correct data.shards"
        )
    return paths, manifests


def _check_shard(path: Path, record: ShardRecord | None, scan: bool, num_classes: int) -> _Shard:
    """One shard and what reading it takes: the index beside the tar, or where there is none a scan.

    Raises:
        DataError: see `ShardSet.open`.
    """
    size = path.stat().st_size
    if record is not None and size != record.bytes:
        raise DataError(f"{path}: has {size} bytes, the manifest says {record.bytes}; copy it again")
    index = index_tar(path, with_labels=num_classes > 0) if scan else _map_index(path)
    if len(index) == 0:
        raise DataError(f"{path}: holds no samples; remove it or write it again")
    if record is not None and len(index) != record.samples:
        raise DataError(f"{path}: holds {len(index)} samples, the manifest says {record.samples}; write it again")
    if int((index["offset"] + index["size"]).max()) > size:
        raise DataError(
            f"{_index_path(path)}: points behind the tar's {size} bytes; remove it, the tar is then scanned"
        )
    wrong = np.flatnonzero((index["label"] < 0) | (index["label"] >= num_classes))
    if num_classes and len(wrong):
        offset, _, label, _ = index[wrong[0]].item()
        found = "no label" if label == NO_LABEL else f"label {label}"
        raise DataError(
            f"{path}: byte {offset}: sample {wrong[0]} has {found}, needs one in 0..{num_classes - 1}; "
            "correct model.num_classes or the shard"
        )
    return _Shard(path, len(index), size, None if record is None else record.sha256, index if scan else None)


def _index_path(tar: Path) -> Path:
    return tar.with_suffix(".index.npy")


def _map_index(tar: Path) -> IndexArray:
    path = _index_path(tar)
    try:
        index = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: cannot be mapped ({error}); remove it, the tar is then scanned") from error
    if index.dtype != INDEX or index.ndim != 1:
        raise DataError(f"{path}: holds {index.dtype} {index.shape}, not an index; remove it, the tar is then scanned")
    return np.asarray(index)  # still mapped; np.memmap's own indexing is several times slower


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
    if not 0 <= label <= _LARGEST_LABEL:
        raise DataError(
            f"{path}: byte {member.offset_data}: {member.name} holds {text!r}, not an integer in 0..{_LARGEST_LABEL}; "
            "write the class number in decimal"
        )
    return label


@contextmanager
def _appearing_whole(path: Path) -> Iterator[IO[bytes]]:
    """A file that has its name only when it is complete and on disk."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
