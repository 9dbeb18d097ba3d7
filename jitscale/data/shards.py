"""Shards: ordinary webdataset tars, checked before training, read by index.

    shard-000000.tar         members KEY.png (or .webp, .npy, .jpg) and KEY.cls (the label in decimal)
    shard-000000.index.npy   where the images lie in it, one `INDEX` record a sample, to be memory-mapped
    shard-000000.keys.npy    hashes of the keys, read only where a fraction of the samples is held out
    ...
    manifest.json            what belongs together

webdataset reads these tars, and tars that webdataset wrote are read here, after a scan of their headers. Only reading
by index and the order are our own: webdataset's pipeline can neither resume exactly nor change its number of readers.
"""

from __future__ import annotations

import copy
import getpass
import logging
import os
import resource
import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np

from jitscale.config import Config, held_out_fraction
from jitscale.data.cache import ShardCache
from jitscale.data.find import find_remote_shards, find_shards
from jitscale.data.images import ImageError, UInt8Array, center_crop, decode
from jitscale.data.lru import remembered
from jitscale.data.manifest import MANIFEST, Manifest, ShardRecord, content_hash
from jitscale.data.remote import is_remote, read_remote
from jitscale.data.tar_index import (
    NO_LABEL,
    IndexArray,
    OffsetReader,
    ShortReadError,
    count_classes,
    index_path,
    index_tar,
    key_hashes,
    keys_path,
    map_index,
    parse_keys,
    scan_tar,
)
from jitscale.errors import DataError
from jitscale.keyed_random import Int64Array, Purpose, UInt64Array, uniform

logger = logging.getLogger(__name__)

DEFAULT_CACHE_BYTES = 100 * 10**9

_FIRST_IMAGES = 10  # looked at before training; an undecodable one is met later, and replaced
_MOST_MAPPED = 4096  # shards that a process keeps open
_MOST_HELD_OUT_MAPPED = 2  # of held-out samples, which are read in sequence
_KEY_THREADS = 16  # that read the keys of remote shards


class ShardSet:
    """Checked shards whose samples are read by (shard, index) in any process.

    Attributes:
        num_samples: over all shards.
        samples_per_shard: (shards,).
        image_size: pixels a side of the images that `read` returns.
        folder: of the first shard; None for remote ones.
        class_names: from the manifest, or None.
        is_hashed: whether manifests vouch for the content of all shards.
        stored: codec, resolution and crop as the first manifest has them; empty without one.
        manifest_hash: `content_hash` of the shards.
        held_out: samples that are never trained on, as `data.held_out` says; None where all are.
    """

    def __init__(
        self,
        shards: list[_Shard],
        num_classes: int,
        image_size: int | None,
        manifests: Sequence[Manifest],
        cache: ShardCache | None,
    ) -> None:
        self._shards = shards
        self._manifests = manifests
        self._cache = cache
        self._num_classes = num_classes
        self._opened: OrderedDict[int, _LocalShard | _CachedShard] = OrderedDict()
        self.folder = Path(shards[0].location).parent if cache is None else None
        self._most_open: int | None = None  # None: what the process allows
        self._selection: _Selection | None = None
        self.held_out: ShardSet | None = None
        self._count(np.array([shard.samples for shard in shards], np.int64))
        self.class_names = manifests[0].class_names if manifests else None
        self.stored: dict[str, str | int | None] = {
            name: getattr(manifest, name) for manifest in manifests[:1] for name in ("codec", "resolution", "crop")
        }
        self.is_hashed = all(shard.sha256 is not None for shard in shards)
        self._enlarge = self.is_hashed and all(manifest.resolution is None for manifest in manifests)
        self.manifest_hash = content_hash([(s.name, s.samples, s.bytes, s.sha256) for s in shards])
        self.image_size = self._first_image_size(image_size)  # a size that does not fit is met now

    @classmethod
    def open(
        cls,
        pattern: str | Path,
        num_classes: int,
        image_size: int | None = None,
        *,
        cache_dir: str | Path | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> ShardSet:
        """Find the shards and check them as far as possible without reading the images.

        Args:
            pattern: a folder, a glob, or a brace pattern such as `shard-{000..007}.tar`. A folder's manifest says
                which shards there must be, and vouches for their size and for the index beside them. A tar that
                no manifest names is scanned, since an index of unknown origin may be of another tar. In remote storage
                (s3://, gs://, https://) a folder, or a brace pattern of tars in one, and it must have a manifest.
            num_classes: labels must be below it; 0 for unconditional, where labels are ignored and read as 0.
            image_size: pixels a side; larger images are centre-cropped as they are read. Smaller ones are enlarged, as
                the recipe does, where a manifest says that images have their original sizes, and refused elsewhere:
                there they are more likely the wrong shards. None: that of the first image.
            cache_dir: a folder of this node for remote shards; None for one of this user in $TMPDIR.
            cache_bytes: what it may hold at most.

        Raises:
            DataError: the first thing that is wrong, with shard, byte, limit and remedy.
        """
        text, cache = str(pattern), None
        if is_remote(text):
            cache = ShardCache(default_cache_dir() if cache_dir is None else Path(cache_dir), cache_bytes)
            shards, manifests = _remote_shards(text, num_classes, image_size)
        else:
            shards, manifests = _local_shards(text, num_classes, image_size)
        if not any(shard.samples for shard in shards):
            raise DataError(f"{pattern}: {len(shards)} shards without a single sample; write them again")
        return cls(shards, num_classes, image_size, manifests, cache)

    @property
    def is_remote(self) -> bool:
        """Whether shards are fetched before they are read."""
        return self._cache is not None

    def without_fraction(self, fraction: float) -> ShardSet:
        """These samples without about `fraction` of them, which become `held_out`.

        The key of a sample and the fraction alone decide. So the same pictures are held out however they are packed, at
        every resolution and under every seed, and a larger fraction holds out all that a smaller one does.

        Args:
            fraction: in (0, 1).

        Raises:
            DataError: none or all of the samples are chosen, the keys cannot be read, or none of the first held-out
                images can be decoded.
        """
        rows = [np.flatnonzero(uniform(0, Purpose.HELD_OUT, keys) < fraction) for keys in self._keys()]
        chosen, total = sum(map(len, rows)), self.num_samples
        if chosen == 0:
            raise DataError(f"data.held_out={fraction:g}: chooses none of {total} samples; raise it, or name shards")
        if chosen == total:
            raise DataError(f"data.held_out={fraction:g}: leaves none of {total} samples to train on; lower it")
        return self._select(_Selection(rows, others=True)).holding_out(self._select(_Selection(rows, others=False)))

    def holding_out(self, held_out: ShardSet) -> ShardSet:
        """This set, with `held_out` as those that are never trained on.

        Raises:
            DataError: none of the first held-out images can be decoded.
        """
        held_out._first_image_size(self.image_size)
        held_out._most_open = _MOST_HELD_OUT_MAPPED
        self.held_out = held_out
        return self

    def check_apart(self, held_out: ShardSet) -> None:
        """Refuse `held_out` where a shard of it is one of these too, or where its labels mean other classes.

        Raises:
            DataError: naming the shard.
        """
        own = {mark: shard for shard in self._shards if shard.samples for mark in shard.marks()}
        for shard in held_out._shards:
            for mark in shard.marks() if shard.samples else ():
                if mark in own:
                    raise DataError(
                        f"data.held_out: {shard.location} is trained on as {own[mark].location} of data.shards; name "
                        "shards that data.shards leaves out, or hold out a fraction, for example data.held_out=0.01"
                    )
        if self.class_names and held_out.class_names and self.class_names != held_out.class_names:
            raise DataError(
                "data.held_out: its manifest names other classes than that of data.shards, and a label must mean one "
                "thing; write its shards with the same class names"
            )

    def fetch(self, shard: int) -> None:
        """Bring a remote shard to this node, if it is not there.

        Raises:
            DataError: see `ShardCache.fetch`.
        """
        if self._cache is not None:
            self._cache.fetch(self._shards[shard].location, self._shards[shard].record())

    def class_counts(self) -> list[int]:
        """Samples of each class: by the manifest where it counts just these shards, else by their indexes.

        Raises:
            DataError: there are no classes, or remote shards whose manifest does not count them.
        """
        if not self._num_classes:
            raise DataError("data.shards: model.num_classes=0, so that no class has a frequency")
        counted = [manifest.class_counts or [] for manifest in self._manifests]
        if counted and sum(map(sum, counted)) == self.num_samples and max(map(len, counted)) <= self._num_classes:
            padded = [np.pad(counts, (0, self._num_classes - len(counts))) for counts in counted]
            return cast(list[int], np.sum(padded, axis=0).tolist())
        if self._cache is not None:
            raise DataError(
                f"{self._shards[0].location}: the manifest does not count the samples of each class; write it again "
                "with tools/index_shards.py"
            )
        indices = (map_index(index_path(Path(s.location))) if s.index is None else s.index for s in self._shards)
        return count_classes(indices, self._num_classes) or []

    def check_cache(self, side_by_side: int) -> None:
        """Refuse a cache in which shards would make room for each other before they are used up.

        Args:
            side_by_side: how many shards this node reads at the same time.

        Raises:
            DataError: naming the size that is needed.
        """
        if self._cache is None:
            return
        largest = sorted((shard.bytes for shard in self._shards), reverse=True)[:side_by_side]
        if sum(largest) > self._cache.capacity:
            raise DataError(
                f"data.cache_gb={self._cache.capacity / 1e9:g}: this node reads {len(largest)} shards side by side, "
                f"together {sum(largest) / 1e9:.3g} GB; raise it, or lower data.streams"
            )

    def read(self, shard: int, index: int) -> tuple[UInt8Array, int]:
        """Sample `index` of `shard`: its image, uint8 (image_size, image_size, 3), maybe read-only, and its label.

        Raises:
            ImageError: the image cannot be decoded, or is smaller than the image size; other samples may be sound.
            DataError: the shard cannot be read.
        """
        return self._read(shard, index, self.image_size)

    def stored_index(self, shard: int, index: int) -> int:
        """Which sample of the tar `index` is, where this set has only some of them."""
        return index if self._selection is None else self._selection.stored_index(shard, index)

    def shard_and_index(self, sample: int) -> tuple[int, int]:
        """Where `sample`, counted over all shards in turn, lies."""
        shard = int(np.searchsorted(self._starts, sample, side="right")) - 1
        return shard, sample - int(self._starts[shard])

    def __getstate__(self) -> dict[str, object]:
        # Neither descriptors nor maps travel to another process; workers read what is trained on.
        return {**self.__dict__, "_opened": OrderedDict(), "held_out": None}

    def _count(self, samples_per_shard: Int64Array) -> None:
        self.samples_per_shard = samples_per_shard
        self._starts = np.cumsum(samples_per_shard) - samples_per_shard
        self.num_samples = int(samples_per_shard.sum())

    def _select(self, selection: _Selection) -> ShardSet:
        part = copy.copy(self)
        part._selection, part._opened = selection, OrderedDict()
        part._count(selection.counts(self.samples_per_shard))
        return part

    def _keys(self) -> list[UInt64Array]:
        """The hashes of the keys of every shard.

        Raises:
            DataError: they cannot be read.
        """
        if self._cache is not None:
            with ThreadPoolExecutor(_KEY_THREADS) as threads:
                return list(threads.map(_remote_keys, self._shards))
        bare = [shard for shard in self._shards if not shard.has_keys()]
        if bare:
            logger.info(
                "data.held_out: %d of %d shards, such as %s, have no keys beside them; scanning their headers at every "
                "start (tools/index_shards.py --force writes the keys)",
                len(bare),
                len(self._shards),
                bare[0].location,
            )
        return [_local_keys(shard) for shard in self._shards]

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
        opened = remembered(
            self._opened, shard, lambda: self._open_shard(shard), self._most_open or _most_open_shards()
        )
        index = self.stored_index(shard, index)
        offset, size, label, extension = opened.index[index].item()
        try:
            data = opened.read(offset, size)
        except ShortReadError as error:
            what = f"{error}: the file was cut while in use; copy it again"
            raise DataError(f"{self._shards[shard].location}: byte {offset}: sample {index} {what}") from error
        except OSError as error:
            what = f"cannot be read ({error}); start again when the storage works"
            raise DataError(f"{self._shards[shard].location}: byte {offset}: sample {index} {what}") from error
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
            raise ImageError(f"{self._shards[shard].location}: byte {offset}: sample {index} {error}") from error
        return image, label if self._num_classes else 0

    def _open_shard(self, number: int) -> _LocalShard | _CachedShard:
        shard = self._shards[number]
        if self._cache is None:
            return _LocalShard(shard)
        with_labels = self._num_classes > 0
        index = self._cache.index(shard.location, shard.record(), self.class_names, with_labels=with_labels)
        _check_index(shard.location, index, shard.samples, shard.bytes, self._num_classes)
        return _CachedShard(shard, self._cache, index)


def open_configured(config: Config) -> ShardSet:
    """What `data.shards` and `data.held_out` leave to train on, under the configuration's settings.

    In both, {resolution} stands for `model.image_size`.

    Raises:
        DataError: see `ShardSet.open`; or nothing is held out, nothing is left, or held-out shards are trained on too.
    """
    data, model = config.data, config.model
    shards = _open_sized(config, data.shards, model.num_classes, model.image_size)
    fraction = held_out_fraction(data)
    if data.held_out is None:
        return shards
    if fraction is not None:
        return shards.without_fraction(fraction)
    try:
        held_out = _open_sized(config, data.held_out, model.num_classes, model.image_size)
    except DataError as error:
        # What there is to correct is this setting, where the message names the usual one.
        raise DataError(f"data.held_out: {str(error).replace('data.shards', 'data.held_out')}") from error
    shards.check_apart(held_out)
    return shards.holding_out(held_out)


def open_reference(config: Config) -> ShardSet:
    """The real images of an evaluation, without their labels; {resolution} stands for their size.

    Raises:
        DataError: see `ShardSet.open`.
    """
    size = config.evaluation.reference_size or config.model.image_size
    return _open_sized(config, config.evaluation.reference or config.data.shards, 0, size)


def open_labelled(config: Config) -> ShardSet:
    """The shards whose class frequencies `evaluation.labels=data` means: `data.shards`, or else the reference.

    Raises:
        DataError: see `ShardSet.open`.
    """
    pattern = config.data.shards or config.evaluation.reference or ""
    return _open_sized(config, pattern, config.model.num_classes, config.model.image_size)


def _open_sized(config: Config, pattern: str, num_classes: int, image_size: int) -> ShardSet:
    return ShardSet.open(
        pattern.replace("{resolution}", str(image_size)),
        num_classes,
        image_size,
        cache_dir=config.data.cache_dir,
        cache_bytes=int(config.data.cache_gb * 1e9),
    )


@dataclass(frozen=True)
class _Shard:
    name: str
    location: str  # a path, or a URL
    samples: int
    bytes: int
    sha256: str | None  # None: no manifest names it
    index: IndexArray | None  # None: in the file beside the tar

    def record(self) -> ShardRecord:
        """As the manifest has it; only for shards that one names."""
        assert self.sha256 is not None
        return ShardRecord(self.name, self.samples, self.bytes, self.sha256)

    def marks(self) -> Iterator[object]:
        """What two names of the same shard have in common: the file, and the hash in a manifest."""
        if is_remote(self.location):
            yield self.location
        else:
            status = os.stat(self.location)
            yield status.st_dev, status.st_ino
        if self.sha256 is not None:
            yield self.sha256

    def has_keys(self) -> bool:
        """Whether a file beside the tar holds them; where no manifest names the tar, it may be of another tar."""
        return self.index is None and keys_path(Path(self.location)).exists()


@dataclass(frozen=True)
class _Selection:
    """Some samples of every shard: those in `rows`, or all others.

    Nothing is stored for the others, so that holding out a hundredth of 10^8 samples takes 16 MB at most.
    """

    rows: list[Int64Array]  # of each shard, rising
    others: bool

    def counts(self, samples_per_shard: Int64Array) -> Int64Array:
        """Samples of each shard, (shards,)."""
        chosen = np.array([len(rows) for rows in self.rows], np.int64)
        return samples_per_shard - chosen if self.others else chosen

    def stored_index(self, shard: int, index: int) -> int:
        """Where sample `index` of the selection lies in the shard."""
        if not self.others:
            return int(self.rows[shard][index])
        return index + int(np.searchsorted(self._others_before[shard], index, side="right"))

    @cached_property
    def _others_before(self) -> list[Int64Array]:
        """How many samples that are not in `rows` lie before each one that is: (rows,) of each shard."""
        return [rows - np.arange(len(rows)) for rows in self.rows]


class _CachedShard:
    """A remote shard with its index in memory. The tar is opened for each read: an open one would hold its room."""

    def __init__(self, shard: _Shard, cache: ShardCache, index: IndexArray) -> None:
        self.index = index
        self._shard, self._cache = shard, cache

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on; fetches the shard if it was evicted.

        Raises:
            DataError: see `ShardCache.fetch`.
            OSError: the disk fails.
        """
        return OffsetReader(self._cache.open(self._shard.location, self._shard.record())).read(offset, size)


class _LocalShard(OffsetReader):
    """A shard that stays open, with its index, which is mapped unless no file holds it."""

    def __init__(self, shard: _Shard) -> None:
        path = Path(shard.location)
        self.index = map_index(index_path(path)) if shard.index is None else shard.index
        try:
            super().__init__(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be opened any more ({error}); restore it") from error


def _local_keys(shard: _Shard) -> UInt64Array:
    path = Path(shard.location)
    if not shard.has_keys():
        return key_hashes(scan_tar(path))
    beside = keys_path(path)
    try:
        content = beside.read_bytes()
    except OSError as error:
        raise DataError(f"{beside}: cannot be read ({error}); start again when the storage works") from error
    return parse_keys(content, str(beside), shard.samples)


def _remote_keys(shard: _Shard) -> UInt64Array:
    url = f"{shard.location.removesuffix('.tar')}.keys.npy"
    try:
        return parse_keys(read_remote(url), url, shard.samples)
    except DataError as error:
        raise DataError(
            f"data.held_out: a fraction is chosen by the samples' keys, and {error} (tools/index_shards.py writes it); "
            "or name shards to hold out"
        ) from error


def default_cache_dir() -> Path:
    """Where remote shards are kept on a node unless the configuration names another folder."""
    return Path(tempfile.gettempdir()) / f"jitscale-shards-{getpass.getuser()}"


def _most_open_shards() -> int:
    """A shard holds two descriptors, since Python's mmap keeps one; 256 are left for everything else.

    It holds a mapping too, of which Linux gives a process 65,530.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST_MAPPED if limit == resource.RLIM_INFINITY else min(_MOST_MAPPED, max(16, (limit - 256) // 2))


def _local_shards(pattern: str, num_classes: int, image_size: int | None) -> tuple[list[_Shard], list[Manifest]]:
    """Checked shards, and the manifests that vouch for them; where there is no index to trust, tars are scanned."""
    paths, found = find_shards(pattern)
    manifests = list(found.values())
    _check_manifests(pattern, manifests, num_classes, image_size)
    records = {folder / record.name: record for folder, manifest in found.items() for record in manifest.shards}
    unindexed = {path for path in paths if path not in records or not index_path(path).exists()}
    if unindexed:
        logger.info("%s: %d of %d shards have no index; scanning their headers", pattern, len(unindexed), len(paths))
    names = manifests[0].class_names if manifests else None
    return [_check_shard(path, records.get(path), path in unindexed, num_classes, names) for path in paths], manifests


def _remote_shards(pattern: str, num_classes: int, image_size: int | None) -> tuple[list[_Shard], list[Manifest]]:
    """Shards as their manifest describes them; their content is checked when it is fetched."""
    folder, names = find_remote_shards(pattern)
    manifest = Manifest.parse(read_remote(f"{folder}/{MANIFEST}").decode(errors="replace"), f"{folder}/{MANIFEST}")
    _check_manifests(pattern, [manifest], num_classes, image_size)
    records = {record.name: record for record in manifest.shards}
    unknown = [name for name in names or [] if name not in records]
    if unknown:
        raise DataError(f"{folder}/{unknown[0]}: is not in the manifest of its folder; correct data.shards")
    chosen = manifest.shards if names is None else [records[name] for name in names]
    shards = [_Shard(one.name, f"{folder}/{one.name}", one.samples, one.bytes, one.sha256, None) for one in chosen]
    return shards, [manifest]


def _check_manifests(pattern: str, manifests: list[Manifest], num_classes: int, image_size: int | None) -> None:
    if any(manifest.class_names != manifests[0].class_names for manifest in manifests):
        raise DataError(f"{pattern}: its folders name different classes; a label must mean one thing, open one folder")
    for manifest in manifests:
        if manifest.class_names is not None and len(manifest.class_names) != manifest.num_classes:
            raise DataError(
                f"{pattern}: the manifest names {len(manifest.class_names)} classes and says that there are "
                f"{manifest.num_classes}; write it again"
            )
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
    index = (
        index_tar(path, with_labels=num_classes > 0, class_names=class_names) if scan else map_index(index_path(path))
    )
    if len(index) == 0 and record is None:
        raise DataError(f"{path}: holds no samples; remove it or write it again")
    _check_index(str(path), index, len(index) if record is None else record.samples, size, num_classes)
    sha256 = None if record is None else record.sha256
    return _Shard(path.name, str(path), len(index), size, sha256, index if scan else None)


def _check_index(location: str, index: IndexArray, samples: int, size: int, num_classes: int) -> None:
    """Compare the index of a tar with what is known of it.

    Raises:
        DataError: it has another number of samples, points behind the tar's end, or has a label out of range.
    """
    if len(index) != samples:
        raise DataError(f"{location}: holds {len(index)} samples, the manifest says {samples}; write it again")
    if int((index["offset"] + index["size"]).max(initial=0)) > size:
        raise DataError(
            f"{index_path(Path(location))}: points behind the tar's {size} bytes; remove it, the tar is then scanned"
        )
    wrong = np.flatnonzero((index["label"] < 0) | (index["label"] >= num_classes))
    if num_classes and len(wrong):
        offset, _, label, _ = index[wrong[0]].item()
        found = "no label" if label == NO_LABEL else f"label {label}"
        raise DataError(
            f"{location}: byte {offset}: sample {wrong[0]} has {found}, needs one in 0..{num_classes - 1}; "
            "correct model.num_classes or the shard"
        )
