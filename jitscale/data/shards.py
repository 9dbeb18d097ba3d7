"""Shards: ordinary webdataset tars, checked before training and read by index.

    shard-000000.tar         members KEY.png (or .webp, .npy, .jpg) and KEY.cls (the label in decimal)
    shard-000000.index.npy   places of the images in the tar, one `INDEX` record per sample; memory-mapped
    shard-000000.keys.npy    hashes of the keys, read only if a fraction of the samples is held out
    ...
    manifest.json            the list of all shards, with their properties

webdataset can read these tars. Tars that webdataset wrote can be read here after a scan of their headers. Reading by
index and the order of samples are our own code, because webdataset's pipeline can neither resume exactly nor change its
number of readers.
"""

from __future__ import annotations

import copy
import logging
import resource
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import attrgetter
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from jitscale.config import Config, held_out_fraction
from jitscale.data.cache import ShardCache
from jitscale.data.cache_folder import usual_cache_folder
from jitscale.data.class_order import refuse_other_classes
from jitscale.data.images import GREY, RGB, ImageError, UInt8Array, center_crop, decode
from jitscale.data.lru import LRUCache
from jitscale.data.manifest import Manifest, content_hash, label_key
from jitscale.data.remote import is_remote
from jitscale.data.shard_files import ShardFile, ShardRequest, check_index, local_shards, remote_shards
from jitscale.data.tar_index import IndexArray, OffsetReader, ShortReadError, count_classes
from jitscale.data.tar_labels import NOWHERE
from jitscale.data.tar_members import is_image_header
from jitscale.errors import DataError, StorageError, data_error
from jitscale.keyed_random import Int64Array, Purpose, uniform

logger = logging.getLogger(__name__)

_FIRST_IMAGES = 10  # one of these must be decodable at the start; training replaces undecodable images
_MOST_MAPPED = 4096  # shards that a process keeps open
_MOST_HELD_OUT_MAPPED = 2  # held-out shards, which are read in sequence
_KEY_THREADS = 16  # threads that read the keys of the shards


class ShardSet:
    """Checked shards, with all or a part of their samples. Any process can read them by (shard, index)."""

    def __init__(
        self, wanted: ShardRequest, shards: list[ShardFile], manifests: Sequence[Manifest], cache: ShardCache | None
    ) -> None:
        self._wanted, self._num_classes = wanted, wanted.num_classes
        self._shards, self._manifests, self._cache = shards, manifests, cache
        self.is_remote = cache is not None  # whether shards are fetched before they are read
        self._opened: LRUCache[int, _OpenShard] = LRUCache()
        # An open shard holds two descriptors, since Python's mmap keeps one, and 256 are left for other files. It also
        # holds a mapping, of which Linux allows 65,530 per process.
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        unlimited = limit == resource.RLIM_INFINITY
        self._most_open = _MOST_MAPPED if unlimited else min(_MOST_MAPPED, max(16, (limit - 256) // 2))
        self._chosen: list[Int64Array] | None = None  # rows of each tar; None: this set has all samples
        self._has_chosen = False  # True: this set has the chosen rows; False: all others
        self._count(np.array([shard.record.samples for shard in shards], np.int64))
        self.folder = Path(shards[0].location).parent if cache is None else None  # folder of the first shard
        self.held_out: ShardSet | None = None  # by `data.held_out`; None: all samples are trained on
        self.class_names = manifests[0].class_names if manifests else None  # None: labels have no names
        self._label_key = label_key(manifests[0] if manifests else None) if wanted.num_classes else NOWHERE
        self.classes = manifests[0].num_classes if manifests else None  # number of classes; None if unknown
        datasets = {manifest.dataset for manifest in manifests}
        self.dataset = datasets.pop() if len(datasets) == 1 else None  # see `Manifest.dataset`
        self.stored: dict[str, str | int | None] = {  # entries of the first manifest; empty without one
            name: getattr(manifest, name) for manifest in manifests[:1] for name in ("codec", "resolution", "crop")
        }
        self.is_hashed = all(shard.record.sha256 for shard in shards)  # the manifests know the content of all shards
        self._enlarge = self.is_hashed and all(manifest.resolution is None for manifest in manifests)
        # Identifies the samples, their order and their background.
        self.manifest_hash = content_hash((shard.record, shard.background) for shard in shards)
        self.channels = wanted.channels  # channels of the images as they are read
        kept = {manifest.channels for manifest in manifests if manifest.resolution is not None}
        self.stored_channels = kept.pop() if len(kept) == 1 else None  # channels of the stored images; None if unknown
        self.image_size = wanted.image_size or 0
        self.image_size = self._first_image_size()  # pixels per side; fails now if the size does not fit

    @classmethod
    def open(
        cls,
        pattern: str | Path,
        num_classes: int,
        image_size: int | None = None,
        *,
        cache_dir: str | Path | None = None,
        cache_bytes: int = 100 * 10**9,
        setting: str = "data.shards",
        size_setting: str = "model.image_size",
        all_classes: bool = False,
        channels: int = RGB,
    ) -> ShardSet:
        """Find the shards and check them as far as possible without reading the images.

        Raises a DataError at the first fault, with shard, byte, limit and remedy.

        Args:
            pattern: a folder, a glob, or a brace pattern such as `shard-{000..007}.tar`. The manifest of a folder lists
                its shards with their sizes, and their indexes are trusted. A tar that no manifest names is scanned,
                because an index of unknown origin may be of another tar. In remote storage (s3://, gs://, https://), a
                folder with a manifest, or a brace pattern of tars in such a folder.
            num_classes: labels must be below it; 0 for unconditional: labels are ignored and read as 0.
            image_size: pixels per side, to which larger images are cropped when they are read; None: the size of the
                first image. Smaller images are enlarged, as in the recipe, if a manifest states that images have their
                original sizes. Otherwise they are refused, because the shards are probably the wrong ones.
            cache_dir: a folder of this node for remote shards; None: this user's folder in $TMPDIR.
            cache_bytes: the capacity of that folder.
            setting: the setting with the pattern, for messages; `size_setting` is the one with the image size.
            all_classes: refuse a manifest with fewer classes than `num_classes`.
            channels: 3, or 1 for luma. Any shard can be read as either, see `decode_file`.
        """
        wanted = ShardRequest(str(pattern), num_classes, image_size, setting, size_setting, all_classes, channels)
        cache, find = None, local_shards
        if is_remote(wanted.pattern):
            folder = usual_cache_folder() if cache_dir is None else Path(cache_dir)
            cache, find = ShardCache(folder, cache_bytes), remote_shards
        shards, manifests = find(wanted)
        if not any(shard.record.samples for shard in shards):
            raise DataError(f"{pattern}: {len(shards)} shards have no sample at all; write them again")
        return cls(wanted, shards, manifests, cache)

    def without_fraction(self, fraction: float) -> ShardSet:
        """These samples without about `fraction` of them, in (0, 1), which become `held_out`.

        Only the key of a sample and the fraction decide. So the same pictures are held out in every packing, at every
        resolution and under every seed, and a larger fraction holds out all samples of a smaller one. Raises a
        DataError if none or all samples are chosen, if the keys cannot be read, or if `holding_out` refuses.
        """
        bare = [shard.location for shard in self._shards if not shard.has_keys()]
        if bare:
            what = f"{len(bare)} of {len(self._shards)} shards, such as {bare[0]}, have no keys next to them"
            remedy = "tools/index_shards.py --force writes the keys"
            logger.info("data.held_out: %s; scanning their headers at every start (%s)", what, remedy)
        with ThreadPoolExecutor(_KEY_THREADS) as threads:
            keys = threads.map(ShardFile.keys, self._shards)
            chosen = [np.flatnonzero(uniform(0, Purpose.HELD_OUT, found) < fraction) for found in keys]
        counts, total = np.array([len(rows) for rows in chosen], np.int64), self.num_samples
        if counts.sum() == 0:
            raise DataError(f"data.held_out={fraction:g}: chooses none of {total} samples; raise it, or name shards")
        if counts.sum() == total:
            raise DataError(f"data.held_out={fraction:g}: leaves none of {total} samples to train on; lower it")
        # Only rows of chosen samples are stored. To hold out a hundredth of 10^8 samples takes 8 MB.
        held_out, others = copy.copy(self), copy.copy(self)
        held_out._has_chosen = True
        for part, samples in ((held_out, counts), (others, self.samples_per_shard - counts)):
            part._chosen, part._opened = chosen, LRUCache()
            part._count(samples)
        return others.holding_out(held_out)

    def holding_out(self, held_out: ShardSet) -> ShardSet:
        """This set, with `held_out` as the samples that are never trained on.

        Raises a DataError if none of the first held-out images can be decoded.
        """
        held_out._first_image_size()
        held_out._most_open = _MOST_HELD_OUT_MAPPED
        self.held_out = held_out
        return self

    def check_apart(self, held_out: ShardSet) -> None:
        """Raise a DataError if this set contains a shard of `held_out`, or if the labels mean other classes."""
        known = {mark: shard.location for shard in self._shards for mark in shard.identities()}
        for shard in held_out._shards:
            if common := [known[mark] for mark in shard.identities() if mark in known]:
                what = f"{shard.location} is trained on as {common[0]} of data.shards"
                remedy = "name shards that are not in data.shards, or hold out a fraction, such as data.held_out=0.01"
                raise DataError(f"data.held_out: {what}; {remedy}")
        remedy = "a label must mean one thing, so write its shards with the same class names"
        names, own = held_out.class_names, self.class_names
        refuse_other_classes("data.held_out", names, "data.shards", own, remedy, whole=True)

    def caution(self) -> str | None:
        """A line if the number of channels differs between the stored images and this set; else None."""
        if self.stored_channels in (None, self.channels):
            return None
        said = {GREY: "grey, and are read as RGB with three equal channels", RGB: "RGB, and are read as grey"}
        what = f"{self._wanted.pattern}: the images are {said[self.stored_channels]}"
        return f"{what}; model.in_channels={self.stored_channels} reads them as they are"

    def fetch(self, shard: int) -> None:
        """Fetch a remote shard to this node, unless it is here; raises as `ShardCache.fetch` does."""
        if self._cache is not None:
            self._cache.fetch(self._shards[shard].location, self._shards[shard].record)

    def class_counts(self) -> list[int]:
        """Samples of each class, from the indexes; for remote shards, from their manifest.

        Raises a DataError if there are no classes, or if the manifest of remote shards has no such counts.
        """
        if not self._num_classes:
            raise DataError("data.shards: model.num_classes=0, so there are no classes to count; set model.num_classes")
        if self._cache is None:
            return count_classes((shard.local_index() for shard in self._shards), self._num_classes) or []
        counts = self._manifests[0].class_counts or []
        if sum(counts) != self.num_samples:
            what = "the manifest has no counts of the samples of each class"
            raise DataError(f"{self._shards[0].location}: {what}; write it again with tools/index_shards.py")
        return counts + [0] * (self._num_classes - len(counts))

    def check_cache(self, side_by_side: int) -> None:
        """Raise a DataError if the cache has no room for `side_by_side` shards: it would evict shards still in use."""
        if self._cache is None:
            return
        largest = sorted((shard.record.bytes for shard in self._shards), reverse=True)[:side_by_side]
        if sum(largest) > self._cache.capacity:
            needed = f"reads {len(largest)} shards at the same time, together {sum(largest) / 1e9:.3g} GB"
            held = f"data.cache_gb={self._cache.capacity / 1e9:g}"
            raise DataError(f"{held}: this node {needed}; raise it, or lower data.streams")

    def read(self, shard: int, index: int) -> tuple[UInt8Array, int]:
        """Sample `index` of this set's part of `shard`: its image and its label.

        The image is uint8 (image_size, image_size, channels), and may be read-only. Raises a DataError if the shard
        cannot be read. Raises an ImageError if the image cannot be decoded or is too small; other samples may be sound.
        """
        rows, tar = self._open(shard)
        row = index
        if self._chosen is not None:
            chosen = self._chosen[shard]
            others_before = chosen - np.arange(len(chosen))
            row = int(chosen[index] if self._has_chosen else index + others_before.searchsorted(index, side="right"))
        offset, size, label, _ = rows[row].item()
        try:
            data = (tar or OffsetReader(self._tar(shard))).read(offset, size)
        except OSError as error:
            if isinstance(error, ShortReadError):
                what = f"{error}: the file was truncated while in use; copy it again"
                raise DataError(f"{self.place(shard, row)} {what}") from error
            what = f"cannot be read ({error}); start again when the storage works"
            raise StorageError.of(error, f"{self.place(shard, row)} {what}") from error
        try:
            return self.decode(shard, row, data), label if self._num_classes else 0
        except ImageError:
            at = self._shards[shard]
            if self._cache is None or not self._cache.evict_if_damaged(at.location, at.record):
                raise
            return self.read(shard, index)  # fetches a new copy

    def has_links(self, shard: int, rows: range) -> bool:
        """True if images among the consecutive `rows` of `shard` may be links, which a pass in tar order would miss.

        The bytes of a link are those of an earlier image, or of a member with another name. Raises an OSError if
        headers cannot be read, a DataError as `ShardCache.fetch`.
        """
        offsets, tar = self._open(shard).rows["offset"], self._open(shard).tar or OffsetReader(self._tar(shard))
        headers = (tar.read(int(offsets[row]) - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE) for row in rows)
        return bool((np.diff(offsets) <= 0).any()) or not all(map(is_image_header, headers))

    def open_tar(self, shard: int, row: int) -> IO[bytes]:
        """The open tar of `shard`, positioned after the image before sample `row`. The caller must close it.

        Raises an OSError if it cannot be opened, a DataError as `ShardCache.fetch`.
        """
        start = 0
        if row:
            before = self._open(shard).rows[row - 1]
            start = int(before["offset"] + before["size"])
        tar = open(self._tar(shard), "rb")  # noqa: SIM115 (see above)
        tar.seek(start + -start % tarfile.BLOCKSIZE)
        return tar

    def decode(self, shard: int, row: int, data: bytes) -> UInt8Array:
        """The image of sample `row` of the tar, from its bytes; returns and raises as `read`.

        Raises a DataError if the size differs from the index.
        """
        _, size, _, extension = self._open(shard).rows[row].item()
        if len(data) != size:
            what = f"has {len(data)} bytes, but {size} in the index; check it with tools/index_shards.py --verify"
            raise DataError(f"{self.place(shard, row)} {what}")
        try:
            background = self._shards[shard].background
            image = decode(data, extension.decode(errors="replace"), background=background, channels=self.channels)
            height, width = image.shape[:2]
            if min(height, width) < self.image_size and not self._enlarge:
                what = f"is {width} x {height} pixels, smaller than the image size {self.image_size}"
                record = "record with tools/index_shards.py that images have their original sizes"
                raise ImageError(f"{what}; lower {self._wanted.size_setting}, write larger shards, or {record}")
            return center_crop(image, self.image_size or min(height, width))
        except ImageError as error:
            raise ImageError(f"{self.place(shard, row)} {error}") from error
        except MemoryError as error:
            remedy = "lower data.num_workers, or write shards of cropped images with tools/make_shards.py"
            raise DataError(f"{self.place(shard, row)} needs more memory than there is; {remedy}") from error

    def place(self, shard: int, row: int) -> str:
        """The place of sample `row` of the tar, for messages; for a remote shard it includes the copy."""
        at = self._shards[shard]
        copied = "" if self._cache is None else f" (copied to {self._cache.copy_of(at.record)})"
        return f"{at.location}{copied}: byte {self._open(shard).rows['offset'][row]}: sample {row}"

    def shard_and_index(self, sample: int) -> tuple[int, int]:
        """The shard and the index of a sample that is counted over all shards in turn."""
        shard = int(np.searchsorted(self._starts, sample, side="right")) - 1
        return shard, sample - int(self._starts[shard])

    def __getstate__(self) -> dict[str, object]:
        # Descriptors and maps cannot be pickled. Workers need training samples only.
        return {**self.__dict__, "_opened": LRUCache(), "held_out": None}

    def _count(self, samples_per_shard: Int64Array) -> None:
        self.samples_per_shard = samples_per_shard  # (shards,)
        self._starts = np.cumsum(samples_per_shard) - samples_per_shard
        self.num_samples = int(samples_per_shard.sum())

    def _first_image_size(self) -> int:
        """The size of the first image that can be decoded. Raises an ImageError if none of the first can be."""
        met: ImageError | None = None
        for sample in range(min(_FIRST_IMAGES, self.num_samples)):
            try:
                return len(self.read(*self.shard_and_index(sample))[0])
            except ImageError as error:
                met = met or error
        assert met is not None
        raise met

    def _tar(self, shard: int) -> str | int:
        """The tar of `shard`: a path, or a descriptor of its copy. Raises as `ShardCache.fetch` does."""
        at = self._shards[shard]
        return at.location if self._cache is None else self._cache.open(at.location, at.record)

    def _open(self, shard: int) -> _OpenShard:
        return self._opened.get_or_compute(shard, lambda: self._open_shard(shard), self._most_open)

    def _open_shard(self, shard: int) -> _OpenShard:
        at = self._shards[shard]
        if self._cache is not None:
            index = self._cache.index(at.location, at.record, self.class_names, self._label_key)
            check_index(at.location, index, at.record, self._num_classes)
            return _OpenShard(index, None)
        with data_error(f"{at.location}: can no longer be opened", "restore it"):
            return _OpenShard(at.local_index(), OffsetReader(at.location))


class _OpenShard(NamedTuple):
    """An open shard, which a process keeps for further reads."""

    rows: IndexArray  # memory-mapped, unless it comes from a scan
    tar: OffsetReader | None  # None for a remote shard: an open tar would keep its room when it is evicted


def open_training_shards(config: Config) -> ShardSet:
    """The training samples of the configuration: `data.shards` without `data.held_out`, which is attached to the set.

    Raises as `ShardSet.open`. Raises a DataError if no samples are held out, if none are left, or if held-out shards
    are also in `data.shards`.
    """
    classes = config.model.num_classes
    shards = open_setting(config, "data.shards", classes)
    if config.data.held_out is None:
        return shards
    if (fraction := held_out_fraction(config.data)) is not None:
        return shards.without_fraction(fraction)
    held_out = open_setting(config, "data.held_out", classes)
    shards.check_apart(held_out)
    return shards.holding_out(held_out)


def open_setting(config: Config, setting: str, num_classes: int, size_setting: str = "model.image_size") -> ShardSet:
    """The shards that `setting` names; {resolution} stands for the value of `size_setting`. See `ShardSet.open`."""
    image_size: int = attrgetter(size_setting)(config)
    pattern: str = attrgetter(setting)(config)
    try:
        return ShardSet.open(
            pattern.replace("{resolution}", str(image_size)),
            num_classes,
            image_size,
            cache_dir=config.data.cache_dir,
            cache_bytes=int(config.data.cache_gb * 1e9),
            setting=setting,
            size_setting=size_setting,
            all_classes=setting == "data.shards" and config.data.classes == "all",
            channels=config.model.in_channels,
        )
    except DataError as error:
        if setting == "data.shards":  # users expect this setting without a prefix
            raise
        raise DataError(f"{setting}: {error}") from error
