"""Shards: ordinary webdataset tars, written whole, checked before training, read by index.

    shard-000000.tar         members KEY.png (or .webp, .npy) and KEY.cls (the label in decimal)
    shard-000000.index.npy   where the images lie in it, one `INDEX` record a sample, to be memory-mapped
    ...
    manifest.json            what belongs together; written last, so that a folder without it was not finished

webdataset reads these tars, and tars that webdataset wrote are read here, after a scan of their headers. Only reading
by index and the order are our own: webdataset's pipeline can neither resume exactly nor change its number of readers.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import resource
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import numpy as np
from braceexpand import braceexpand
from webdataset.writer import TarWriter

from jitscale.data.images import CODECS, UInt8Array, center_crop, decode, encode
from jitscale.data.lru import remembered
from jitscale.data.tar_index import INDEX, LARGEST_LABEL, NO_LABEL, IndexArray, index_tar
from jitscale.errors import DataError
from jitscale.keyed_random import Int64Array, Purpose, permutation

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"


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
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder}: cannot be made ({error}); choose another folder") from error
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
        opened = remembered(self._opened, shard, lambda: _OpenShard(self._shards[shard]), _most_open_shards())
        offset, size, label, extension = opened.index[index].item()
        try:
            image = decode(opened.read(offset, size), extension.decode())
            image = center_crop(image, min(image.shape[:2]) if image_size is None else image_size)
        except DataError as error:
            raise DataError(f"{self._shards[shard].path}: byte {offset}: sample {index} {error}") from error
        return image, label if self._num_classes else 0


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


def _most_open_shards() -> int:
    """A shard holds two descriptors, since Python's mmap keeps one; 256 are left for everything else."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 20 if limit == resource.RLIM_INFINITY else max(16, (limit - 256) // 2)


def _check_labels(labels: Sequence[int] | Int64Array, images: int, class_names: list[str] | None) -> None:
    if images == 0 or images != len(labels):
        raise DataError(f"{images} images and {len(labels)} labels: give one label an image, and at least one image")
    limit = LARGEST_LABEL if class_names is None else len(class_names) - 1
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
