"""Shards: ordinary webdataset tars, checked before training, read by index.

    shard-000000.tar         members KEY.png (or .webp, .npy, .jpg) and KEY.cls (the label in decimal)
    shard-000000.index.npy   where the images lie in it, one `INDEX` record a sample, to be memory-mapped
    ...
    manifest.json            what belongs together

webdataset reads these tars, and tars that webdataset wrote are read here, after a scan of their headers. Only reading
by index and the order are our own: webdataset's pipeline can neither resume exactly nor change its number of readers.
"""

from __future__ import annotations

import glob
import logging
import os
import resource
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from braceexpand import braceexpand

from jitscale.data.images import ImageError, UInt8Array, center_crop, decode
from jitscale.data.lru import remembered
from jitscale.data.manifest import MANIFEST, Manifest, ShardRecord, content_hash
from jitscale.data.tar_index import NO_LABEL, IndexArray, index_path, index_tar, map_index
from jitscale.errors import DataError
from jitscale.keyed_random import Int64Array

logger = logging.getLogger(__name__)

_FIRST_IMAGES = 10  # looked at before training; an undecodable one is met later, and replaced


class ShardSet:
    """Checked shards whose samples are read by (shard, index) in any process.

    Attributes:
        num_samples: over all shards.
        samples_per_shard: (shards,).
        image_size: pixels a side of the images that `read` returns.
        class_names: from the manifest, or None.
        manifest_hash: `content_hash` of the shards.
    """

    def __init__(
        self,
        shards: list[_Shard],
        num_classes: int,
        image_size: int | None,
        class_names: list[str] | None,
        *,
        enlarge: bool,
    ) -> None:
        self._shards = shards
        self._num_classes = num_classes
        self._enlarge = enlarge
        self._opened: OrderedDict[int, _OpenShard] = OrderedDict()
        self.samples_per_shard: Int64Array = np.array([shard.samples for shard in shards], np.int64)
        self._starts = np.cumsum(self.samples_per_shard) - self.samples_per_shard
        self.num_samples = int(self.samples_per_shard.sum())
        self.class_names = class_names
        self.manifest_hash = content_hash([(s.path.name, s.samples, s.bytes, s.sha256) for s in shards])
        self.image_size = self._first_image_size(image_size)  # a size that does not fit is met now

    @classmethod
    def open(cls, pattern: str | Path, num_classes: int, image_size: int | None = None) -> ShardSet:
        """Find the shards and check them as far as possible without reading the images.

        Args:
            pattern: a folder, a glob, or a brace pattern such as `shard-{000..007}.tar`. A folder's manifest says
                which shards there must be, and vouches for their size and for the index beside them. A tar that
                no manifest names is scanned, since an index of unknown origin may be of another tar.
            num_classes: labels must be below it; 0 for unconditional, where labels are ignored and read as 0.
            image_size: pixels a side; larger images are centre-cropped as they are read. Smaller ones are enlarged, as
                the recipe does, where a manifest says that images have their original sizes, and refused elsewhere:
                there they are more likely the wrong shards. None: that of the first image.

        Raises:
            DataError: the first thing that is wrong, with shard, byte, limit and remedy.
        """
        paths, manifests = _find_shards(str(pattern))
        records = {folder / record.name: record for folder, manifest in manifests.items() for record in manifest.shards}
        _check_manifests(str(pattern), list(manifests.values()), num_classes, image_size)
        names = next((manifest.class_names for manifest in manifests.values()), None)
        unindexed = {path for path in paths if path not in records or not index_path(path).exists()}
        if unindexed:
            logger.info(
                "%s: %d of %d shards have no index; scanning their headers", pattern, len(unindexed), len(paths)
            )
        shards = [_check_shard(path, records.get(path), path in unindexed, num_classes, names) for path in paths]
        if not any(shard.samples for shard in shards):
            raise DataError(f"{pattern}: {len(shards)} shards without a single sample; write them again")
        all_described = all(path in records for path in paths)
        original_sizes = all_described and all(manifest.resolution is None for manifest in manifests.values())
        return cls(shards, num_classes, image_size, names, enlarge=original_sizes)

    def read(self, shard: int, index: int) -> tuple[UInt8Array, int]:
        """Sample `index` of `shard`: its image, uint8 (image_size, image_size, 3), maybe read-only, and its label.

        Raises:
            ImageError: the image cannot be decoded, or is smaller than the image size; other samples may be sound.
            DataError: the shard cannot be read.
        """
        return self._read(shard, index, self.image_size)

    def shard_and_index(self, sample: int) -> tuple[int, int]:
        """Where `sample`, counted over all shards in turn, lies."""
        shard = int(np.searchsorted(self._starts, sample, side="right")) - 1
        return shard, sample - int(self._starts[shard])

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_opened": OrderedDict()}  # neither descriptors nor maps travel to another process

    def _first_image_size(self, image_size: int | None) -> int:
        """The size of the first image that can be decoded.

        Raises:
            DataError: none of the first ones can be.
        """
        met: ImageError | None = None
        for sample in range(min(_FIRST_IMAGES, self.num_samples)):
            try:
                return len(self._read(*self.shard_and_index(sample), image_size)[0])
            except ImageError as error:
                met = met or error
        assert met is not None
        raise met

    def _read(self, shard: int, index: int, image_size: int | None) -> tuple[UInt8Array, int]:
        opened = remembered(self._opened, shard, lambda: _OpenShard(self._shards[shard]), _most_open_shards())
        offset, size, label, extension = opened.index[index].item()
        data = opened.read(offset, size)
        try:
            image = decode(data, extension.decode())
            height, width = image.shape[:2]
            if image_size is not None and min(height, width) < image_size and not self._enlarge:
                raise ImageError(
                    f"is {width} x {height} pixels, smaller than the image size {image_size}; lower model.image_size, "
                    "write larger shards, or let tools/index_shards.py record that images have their original sizes"
                )
            image = center_crop(image, min(height, width) if image_size is None else image_size)
        except ImageError as error:
            raise ImageError(f"{self._shards[shard].path}: byte {offset}: sample {index} {error}") from error
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
        self.index = map_index(shard.path) if shard.index is None else shard.index
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


def _check_manifests(pattern: str, manifests: list[Manifest], num_classes: int, image_size: int | None) -> None:
    if any(manifest.class_names != manifests[0].class_names for manifest in manifests):
        raise DataError(f"{pattern}: its folders name different classes; a label must mean one thing, open one folder")
    for manifest in manifests:
        if num_classes and manifest.num_classes > num_classes:
            raise DataError(
                f"{pattern}: the manifest says {manifest.num_classes} classes, the model has {num_classes}; "
                f"set model.num_classes={manifest.num_classes} or choose other shards"
            )
        if num_classes and not manifest.num_classes:
            raise DataError(
                f"{pattern}: the manifest says that there are no labels; set model.num_classes=0 for unconditional "
                "training, or write the shards with labels"
            )
        if image_size is not None and manifest.resolution is not None and manifest.resolution < image_size:
            raise DataError(
                f"{pattern}: the manifest says {manifest.resolution} pixels a side, the model has {image_size}; "
                "lower model.image_size or write larger shards"
            )


def _check_shard(
    path: Path, record: ShardRecord | None, scan: bool, num_classes: int, class_names: list[str] | None
) -> _Shard:
    """One shard and what reading it takes: the index beside the tar, or where there is none a scan.

    Raises:
        DataError: see `ShardSet.open`.
    """
    size = path.stat().st_size
    if record is not None and size != record.bytes:
        raise DataError(f"{path}: has {size} bytes, the manifest says {record.bytes}; copy it again")
    index = index_tar(path, with_labels=num_classes > 0, class_names=class_names) if scan else map_index(path)
    if len(index) == 0 and record is None:
        raise DataError(f"{path}: holds no samples; remove it or write it again")
    if record is not None and len(index) != record.samples:
        raise DataError(f"{path}: holds {len(index)} samples, the manifest says {record.samples}; write it again")
    if int((index["offset"] + index["size"]).max(initial=0)) > size:
        raise DataError(f"{index_path(path)}: points behind the tar's {size} bytes; remove it, the tar is then scanned")
    wrong = np.flatnonzero((index["label"] < 0) | (index["label"] >= num_classes))
    if num_classes and len(wrong):
        offset, _, label, _ = index[wrong[0]].item()
        found = "no label" if label == NO_LABEL else f"label {label}"
        raise DataError(
            f"{path}: byte {offset}: sample {wrong[0]} has {found}, needs one in 0..{num_classes - 1}; "
            "correct model.num_classes or the shard"
        )
    return _Shard(path, len(index), size, None if record is None else record.sha256, index if scan else None)
