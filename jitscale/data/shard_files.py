"""Finds the shards of a pattern, and checks them as far as possible without reading the images."""

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jitscale.addresses import split_query
from jitscale.data import tar_index
from jitscale.data.background import WHITE, Background, parse_background
from jitscale.data.class_order import refuse_other_classes
from jitscale.data.find import find_remote_shards, find_shards
from jitscale.data.manifest import LARGEST_MANIFEST, MANIFEST, Manifest, ShardRecord, label_key
from jitscale.data.remote import is_remote, read_remote
from jitscale.data.tar_labels import NOWHERE
from jitscale.errors import DataError, data_error
from jitscale.keyed_random import UInt64Array

logger = logging.getLogger(__name__)

_NPY_HEADER = 4096  # bytes, upper limit


@dataclass(frozen=True)
class ShardRequest:
    """The shards that a setting names, see `ShardSet.open`."""

    pattern: str
    num_classes: int
    image_size: int | None
    setting: str  # the setting with the pattern, for messages
    size_setting: str  # the setting with the image size, for messages
    all_classes: bool  # manifests must not have fewer classes than `num_classes`
    channels: int  # channels of the images as they are read


@dataclass(frozen=True)
class ShardFile:
    """One shard, with everything that is needed to read it."""

    location: str  # a path, or a URL
    record: ShardRecord  # record in the manifest; without a manifest, from a scan, with no sha256
    index: tar_index.IndexArray | None  # from a scan; None: a file next to the tar
    background: Background  # background that the manifest names; white without a manifest

    def identities(self) -> Iterator[object]:
        """Marks that two names of a shard share: the file, and the hash in a manifest. An empty shard has none."""
        if not self.record.samples:
            return
        if is_remote(self.location):
            yield self.location
        else:
            status = os.stat(self.location)
            yield status.st_dev, status.st_ino
        if self.record.sha256:
            yield self.record.sha256

    def local_index(self) -> tar_index.IndexArray:
        """The index of a local shard: that of the scan, or else the mapped file. Raises as `map_index`."""
        return tar_index.map_index(tar_index.index_path(Path(self.location))) if self.index is None else self.index

    def has_keys(self) -> bool:
        """True if a trusted file next to the tar has the keys. Without a manifest, the file may be of another tar."""
        return is_remote(self.location) or (self.index is None and tar_index.keys_path(Path(self.location)).exists())

    def keys(self) -> UInt64Array:
        """The hashes of the samples' keys. Raises a DataError if they cannot be read."""
        if is_remote(self.location):
            address, query = split_query(self.location)
            url = f"{address.removesuffix('.tar')}.keys.npy{query}"
            remedy = "write them with tools/index_shards.py, or name shards to hold out"
            with data_error("data.held_out: a fraction is chosen by the samples' keys", remedy, DataError):
                content = read_remote(url, 8 * self.record.samples + _NPY_HEADER)
                return tar_index.parse_keys(content, url, self.record.samples)
        path = Path(self.location)
        if not self.has_keys():
            return tar_index.key_hashes(tar_index.scan_tar(path))
        stored = tar_index.keys_path(path)
        with data_error(f"{stored}: cannot be read", "start again when the storage works"):
            return tar_index.parse_keys(stored.read_bytes(), str(stored), self.record.samples)


def local_shards(wanted: ShardRequest) -> tuple[list[ShardFile], list[Manifest]]:
    """The shards in local folders, and the manifests of these folders; raises as `ShardSet.open`.

    A tar is scanned if no manifest names it or if it has no index.
    """
    pattern, num_classes = wanted.pattern, wanted.num_classes
    paths, found = find_shards(pattern, wanted.setting)
    manifests = list(found.values())
    _check_manifests(wanted, manifests)
    records = {folder / record.name: record for folder, manifest in found.items() for record in manifest.shards}
    backgrounds = {folder: parse_background(manifest.background) for folder, manifest in found.items()}
    unindexed = {path for path in paths if path not in records or not tar_index.index_path(path).exists()}
    if unindexed:
        logger.info("%s: %d of %d shards have no index; scanning their headers", pattern, len(unindexed), len(paths))
    names = manifests[0].class_names if manifests else None
    shards = []
    for path in paths:
        size, record, scan = path.stat().st_size, records.get(path), path in unindexed
        background = WHITE if record is None else backgrounds[path.parent]
        if record is not None and size != record.bytes:
            raise DataError(f"{path}: has {size} bytes, the manifest says {record.bytes}; copy it again")
        if scan:
            key = label_key(found.get(path.parent)) if num_classes else NOWHERE
            index = tar_index.index_tar(path, key, names)
        else:
            index = tar_index.map_index(tar_index.index_path(path))
        if record is None:
            record = ShardRecord(path.name, len(index), size, "")
            if not len(index):
                raise DataError(f"{path}: has no samples; remove it or write it again")
        check_index(str(path), index, record, num_classes)
        shards.append(ShardFile(str(path), record, index if scan else None, background))
    return shards, manifests


def remote_shards(wanted: ShardRequest) -> tuple[list[ShardFile], list[Manifest]]:
    """Remote shards, from their manifest. They are checked when they are fetched. Raises as `ShardSet.open`."""
    folder, names, query = find_remote_shards(wanted.pattern, wanted.setting)
    url = f"{folder}/{MANIFEST}{query}"
    manifest = Manifest.read(url, read_remote(url, LARGEST_MANIFEST))
    _check_manifests(wanted, [manifest])
    records = {record.name: record for record in manifest.shards}
    unknown = [name for name in names or [] if name not in records]
    if unknown:
        raise DataError(f"{folder}/{unknown[0]}: is not in the manifest of its folder; correct {wanted.setting}")
    background = parse_background(manifest.background)
    shards = [ShardFile(f"{folder}/{name}{query}", records[name], None, background) for name in names or records]
    return shards, [manifest]


def check_index(location: str, index: tar_index.IndexArray, record: ShardRecord, num_classes: int) -> None:
    """Compare the index of a tar with its record.

    Raises a DataError if the index has another number of samples, points beyond the end of the tar, or has a label out
    of range.
    """
    if len(index) != record.samples:
        raise DataError(f"{location}: holds {len(index)} samples, the manifest says {record.samples}; write it again")
    if int((index["offset"] + index["size"]).max(initial=0)) > record.bytes:
        what = f"points beyond the tar's {record.bytes} bytes; remove it, then the tar is scanned"
        raise DataError(f"{tar_index.index_path(Path(location))}: {what}")
    wrong = np.flatnonzero((index["label"] < 0) | (index["label"] >= num_classes))
    if num_classes and len(wrong):
        offset, _, label, _ = index[wrong[0]].item()
        found = "no label" if label == tar_index.NO_LABEL else f"label {label}"
        what = f"sample {wrong[0]} has {found}, needs one in 0..{num_classes - 1}"
        raise DataError(f"{location}: byte {offset}: {what}; correct model.num_classes or the shard")


def _check_manifests(wanted: ShardRequest, manifests: Sequence[Manifest]) -> None:
    pattern, num_classes, image_size = wanted.pattern, wanted.num_classes, wanted.image_size
    for manifest in manifests[1:]:
        names, others = manifest.class_names, manifests[0].class_names
        refuse_other_classes(pattern, others, "another of its folders", names, "a label must mean one thing, open one")
    if any(manifest.class_names != manifests[0].class_names for manifest in manifests):
        raise DataError(f"{pattern}: its folders name different classes; a label must mean one thing, open one folder")
    for manifest in manifests:
        classes, names, resolution = manifest.num_classes, manifest.class_names, manifest.resolution
        wrong = ""
        if names is not None and len(names) != classes:
            wrong = f"names {len(names)} classes, but num_classes is {classes}; write it again"
        elif num_classes and classes > num_classes:
            remedy = f"set model.num_classes={classes} or choose other shards"
            wrong = f"says {classes} classes, the model has {num_classes}; {remedy}"
        elif wanted.all_classes and 0 < classes < num_classes:
            remedy = f"set model.num_classes={classes}, or data.classes=subset if the others are missing on purpose"
            wrong = f"says {classes} classes, the model has {num_classes}; {remedy}"
        elif num_classes and not classes:
            wrong = "says that there are no labels; set model.num_classes=0 (unconditional) or write shards with labels"
        elif image_size is not None and resolution is not None and resolution < image_size:
            size = f"{wanted.size_setting} is {image_size}"
            wrong = f"says {resolution} pixels per side, {size}; lower it or write larger shards"
        if wrong:
            raise DataError(f"{pattern}: the manifest {wrong}")
