"""Tar shards: writing them, the manifest, the sidecar indexes, and reading single samples by number.

A folder of shards:

    shard-000000.tar ...        ordinary webdataset tars: members KEY.EXT (the image) and KEY.cls (the class number)
    shard-000000.index.npy ...  for each sample: byte offset, size, label, extension
    manifest.json               counts, sizes and hashes; written last

Tars without a manifest or index, from anywhere, are read too: they are indexed when opened.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import re
import tarfile
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import webdataset
from braceexpand import UnbalancedBracesError, braceexpand
from tqdm import tqdm

from jitscale.data.images import CODECS, EXTENSIONS, Pixels, center_crop, decode, encode
from jitscale.errors import DataError
from jitscale.keyed_random import Int64Array, Purpose, permutation

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
NO_LABEL = -1
INDEX_DTYPE = np.dtype([("offset", "<u8"), ("size", "<u4"), ("label", "<i4"), ("extension", "u1")])
END_OF_ARCHIVE = bytes(1024)
GZIP_MAGIC = b"\x1f\x8b"
OPEN_FILES = 64  # file descriptors kept open by one reader

Index = npt.NDArray[np.void]


@dataclass(frozen=True)
class ShardRecord:
    """One shard as the manifest describes it; `sha256` is empty for shards that have no manifest."""

    name: str
    samples: int
    bytes: int
    sha256: str


def write_shards(
    images: Sequence[Pixels] | Pixels,
    labels: Sequence[int] | Int64Array,
    output: Path,
    *,
    codec: str = "png",
    samples_per_shard: int = 1024,
    class_names: Sequence[str] = (),
    seed: int = 0,
) -> None:
    """Write images (H, W, 3) with their labels in a seeded global order; equal input gives equal bytes.

    Raises:
        DataError: the folder holds a manifest already, or it cannot be written.
    """
    if (output / MANIFEST).exists():
        raise DataError(f"{output}: holds shards already; choose another folder or remove it")
    order = permutation(len(labels), seed, Purpose.PACKING_ORDER)
    try:
        output.mkdir(parents=True, exist_ok=True)
        starts = range(0, len(order), samples_per_shard)
        records = []
        for number, start in enumerate(tqdm(starts, unit="shard", desc=f"write {output.name}")):
            chosen = order[start : start + samples_per_shard]
            records.append(_write_shard(output / f"shard-{number:06d}.tar", images, labels, chosen, codec))
        manifest = {
            "samples": len(order),
            "codec": codec,
            "classes": list(class_names),
            "seed": seed,
            "shards": [asdict(record) for record in records],
        }
        _write_whole(output / MANIFEST, json.dumps(manifest, indent=1).encode())
    except OSError as error:
        raise DataError(f"{output}: cannot be written ({error}); choose another folder") from error


def index_tar(path: Path) -> Index:
    """Scan the headers of a tar: one row a sample, in the order of the file.

    A sample is an image member with its `.cls` member; the key runs to the first dot of the file's name, as in
    webdataset. Other members are passed over.

    Raises:
        DataError: an empty, compressed, truncated or damaged tar, a duplicate key, or a label that is not a number.
    """
    _refuse_non_tar(path)
    rows: dict[str, list[int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, _, extension = _split_name(member.name)
                if not member.isfile():
                    continue
                if extension == "cls":
                    content = tar.extractfile(member)
                    assert content is not None
                    labels[key] = _parse_label(content.read(), path, key, member.offset)
                elif extension in EXTENSIONS:
                    if key in rows:
                        raise DataError(f"{path}, byte {member.offset}: key {key!r} has a second image; pack it anew")
                    rows[key] = [member.offset_data, member.size, NO_LABEL, EXTENSIONS.index(extension)]
            end = tar.offset
    except tarfile.TarError as error:
        raise DataError(f"{path}: not a whole tar ({error}); copy or pack it anew") from error
    # Python's reader takes a damaged header for the end of the archive.
    with path.open("rb") as file:
        file.seek(end)
        if file.read(len(END_OF_ARCHIVE)) != END_OF_ARCHIVE:
            raise DataError(f"{path}, byte {end}: no end-of-archive block, the tar is cut or damaged; copy it anew")
    for key, row in rows.items():
        row[2] = labels.get(key, NO_LABEL)
    return np.array([tuple(row) for row in rows.values()], INDEX_DTYPE)


class ShardSet:
    """Verified shards that are read by (shard, sample).

    Attributes:
        samples_per_shard: (number of shards,) int64.
        class_names: from the manifest; empty where there is none.
        manifest_hash: sha256 over names, counts, sizes and hashes of the shards: what the order of samples rests on.
    """

    def __init__(self, paths: Sequence[Path], records: Sequence[ShardRecord], class_names: Sequence[str]) -> None:
        """Use `ShardSet.open`."""
        self._paths = list(paths)
        self._records = list(records)
        self._scanned: dict[int, Index] = {}
        self._mapped: dict[int, Index] = {}
        self._files: OrderedDict[int, int] = OrderedDict()
        self._image_size: int | None = None
        self.class_names = list(class_names)
        self.samples_per_shard = np.array([record.samples for record in records], np.int64)
        identity = json.dumps([asdict(record) for record in records])
        self.manifest_hash = hashlib.sha256(identity.encode()).hexdigest()

    @classmethod
    def open(cls, pattern: str, num_classes: int, image_size: int | None = None) -> ShardSet:
        """Find and verify shards.

        Args:
            pattern: a folder, a glob, or a brace pattern such as `shard-{000000..000127}.tar`.
            num_classes: labels must lie in [0, num_classes); 0 asks for no labels.
            image_size: side of the images that `read` returns; larger ones are centre-cropped. None: as stored.

        Raises:
            DataError: nothing there, a missing or damaged shard, or a missing or impossible label; naming the shard,
                the byte where that is known, and the remedy.
        """
        paths = _find(pattern)
        manifests = {folder: _read_manifest(folder) for folder in {path.parent for path in paths}}
        records, scanned = [], {}
        for number, path in enumerate(paths):
            listed: dict[str, ShardRecord] = manifests[path.parent]["records"]
            size = _refuse_non_tar(path)
            record = listed.get(path.name)
            if record is None or not _index_path(path).exists():
                if record is None:
                    logger.info("%s has no entry in a %s; indexing it", path, MANIFEST)
                scanned[number] = index_tar(path)
                record = record or ShardRecord(path.name, len(scanned[number]), size, "")
            if record.bytes != size:
                raise DataError(f"{path}: {size} bytes where {MANIFEST} says {record.bytes}; copy or pack it anew")
            records.append(record)
        found = cls(paths, records, manifests[paths[0].parent]["classes"])
        found._scanned, found._image_size = scanned, image_size
        if found.num_samples == 0:
            raise DataError(f"{pattern}: the shards hold no images; pack some, or name other shards in data.shards")
        found._check_indexes(num_classes)
        return found

    @property
    def num_samples(self) -> int:
        """Samples of all shards."""
        return int(self.samples_per_shard.sum())

    def read(self, shard: int, sample: int) -> tuple[Pixels, int]:
        """The image (image_size, image_size, 3) and label of one sample.

        Raises:
            DataError: the image cannot be decoded or is smaller than asked for.
        """
        row = self._index(shard)[sample]
        content = os.pread(self._file(shard), int(row["size"]), int(row["offset"]))
        where = f"{self._paths[shard]}, byte {row['offset']}"
        try:
            image = decode(content, EXTENSIONS[row["extension"]])
        except DataError as error:
            raise DataError(f"{where}: {error}; pack the shard anew without it") from error
        size = self._image_size
        if size is not None and image.shape[:2] != (size, size):
            if min(image.shape[:2]) < size:
                raise DataError(
                    f"{where}: {image.shape[1]} x {image.shape[0]} pixels, smaller than model.image_size={size}; "
                    "use a smaller image size or larger images"
                )
            image = center_crop(image, size)
        return image, int(row["label"])

    def __getstate__(self) -> dict[str, Any]:
        """For spawned workers: they open files and map indexes themselves."""
        return {**self.__dict__, "_mapped": {}, "_files": OrderedDict()}

    def _index(self, shard: int) -> Index:
        if shard in self._scanned:
            return self._scanned[shard]
        if shard not in self._mapped:
            self._mapped[shard] = np.load(_index_path(self._paths[shard]), mmap_mode="r", allow_pickle=False)
        return self._mapped[shard]

    def _file(self, shard: int) -> int:
        """An open descriptor. Reading at an offset has no position to share, so forked workers may use it too."""
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        if len(self._files) >= OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        self._files[shard] = os.open(self._paths[shard], os.O_RDONLY)
        return self._files[shard]

    def _check_indexes(self, num_classes: int) -> None:
        for shard, (path, record) in enumerate(zip(self._paths, self._records, strict=True)):
            try:
                index = self._index(shard)
            except (OSError, ValueError) as error:
                raise DataError(f"{_index_path(path)}: unreadable ({error}); remove it to have it rebuilt") from error
            ends = index["offset"] + index["size"]
            if index.dtype != INDEX_DTYPE or len(index) != record.samples or np.any(ends > record.bytes):
                raise DataError(f"{_index_path(path)}: does not fit its shard; remove it to have it rebuilt")
            outside = np.flatnonzero((index["label"] < 0) | (index["label"] >= num_classes))
            if num_classes > 0 and len(outside):
                row = index[outside[0]]
                label = "no label" if row["label"] == NO_LABEL else f"label {row['label']}"
                raise DataError(
                    f"{path}, byte {row['offset']}: {label}, need 0 to {num_classes - 1} (model.num_classes="
                    f"{num_classes}), as have {len(outside)} of its {len(index)} samples; correct model.num_classes "
                    "or the labels (model.num_classes=0 trains without labels)"
                )


def _write_shard(
    path: Path, images: Sequence[Pixels] | Pixels, labels: Sequence[int] | Int64Array, chosen: Int64Array, codec: str
) -> ShardRecord:
    aside = path.with_suffix(".partial")
    with (
        aside.open("wb") as file,
        webdataset.TarWriter(file, encoder=False, mtime=0, user="", group="") as writer,
    ):
        for sample in chosen:
            content = {CODECS[codec]: encode(images[sample], codec), "cls": str(int(labels[sample])).encode()}
            writer.write({"__key__": f"{sample:09d}", **content})
    index = index_tar(aside)
    aside_index = path.with_suffix(".index.partial")
    with aside_index.open("wb") as file:
        np.save(file, index, allow_pickle=False)
    digest = hashlib.sha256(aside.read_bytes()).hexdigest()
    for part, final in ((aside_index, _index_path(path)), (aside, path)):
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(final)
    return ShardRecord(path.name, len(index), path.stat().st_size, digest)


def _write_whole(path: Path, content: bytes) -> None:
    aside = path.with_suffix(".partial")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def _find(pattern: str) -> list[Path]:
    """The shards that a folder, glob or brace pattern names, in order."""
    if not pattern:
        raise DataError("data.shards is not set; give a folder, a glob or a brace pattern of tar shards")
    folder = Path(pattern)
    if folder.is_dir():
        listed = _read_manifest(folder)["records"]
        paths = [folder / name for name in listed] or sorted(folder.glob("*.tar"))
        if not paths:
            raise DataError(f"{folder}: no .tar shards in this folder; correct data.shards")
    elif "{" in pattern:
        try:
            paths = [Path(name) for name in braceexpand(pattern)]
        except UnbalancedBracesError as error:
            raise DataError(f"{pattern}: unbalanced braces; write a pattern such as shard-{{000..127}}.tar") from error
    elif glob.has_magic(pattern):
        paths = sorted(Path(name) for name in glob.glob(pattern))
        if not paths:
            raise DataError(f"{pattern}: matches no file; correct data.shards")
    else:
        paths = [folder]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(f"{missing[0]}{more}: no such shard; correct data.shards or restore it")
    return paths


def _read_manifest(folder: Path) -> dict[str, Any]:
    """`records` by shard name, and `classes`; both empty where there is no manifest."""
    path = folder / MANIFEST
    if not path.exists():
        return {"records": {}, "classes": []}
    try:
        content = json.loads(path.read_text())
        records = {entry["name"]: ShardRecord(**entry) for entry in content["shards"]}
        return {"records": records, "classes": content["classes"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a manifest of shards ({error}); remove it or pack the shards anew") from error


def _refuse_non_tar(path: Path) -> int:
    """The size of a file that begins and ends like an uncompressed tar."""
    size = path.stat().st_size
    if size == 0:
        raise DataError(f"{path}: empty (0 bytes); copy or pack it anew")
    with path.open("rb") as file:
        if file.read(2) == GZIP_MAGIC:
            raise DataError(f"{path}: compressed, samples cannot be read by offset; gunzip it")
        file.seek(max(0, size - len(END_OF_ARCHIVE)))
        if file.read() != END_OF_ARCHIVE:
            raise DataError(f"{path}, byte {size}: no end-of-archive block, the tar is cut; copy or pack it anew")
    return size


def _index_path(shard: Path) -> Path:
    return shard.with_suffix(".index.npy")


def _split_name(name: str) -> tuple[str, str, str]:
    """`a/b.c.png` -> key `a/b`, ".", extension `c.png`, lower case."""
    match = re.fullmatch(r"((?:.*/)?[^./]+)(\.)(.*)", name)
    return (match[1], match[2], match[3].lower()) if match else (name, "", "")


def _parse_label(content: bytes, path: Path, key: str, offset: int) -> int:
    text = content[:32].decode("ascii", "replace").strip()
    if not re.fullmatch(r"-?\d{1,9}", text):
        raise DataError(f"{path}, byte {offset}: label {text!r} of {key!r} is not a whole number; pack it anew")
    label = int(text)
    if label < 0:
        raise DataError(f"{path}, byte {offset}: label {label} of {key!r} is negative; pack it anew")
    return label
