"""Writing shards: tars by webdataset, each with its index beside it, and the manifest of all."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from jitscale.data.images import CODECS, ImageError, UInt8Array, center_crop, content_extension, decode, encode
from jitscale.data.manifest import MANIFEST, BadInput, Manifest, ShardRecord
from jitscale.data.sources import WHOLE_FILE, Source
from jitscale.data.tar_index import (
    LARGEST_LABEL,
    NO_LABEL,
    OffsetReader,
    ShortReadError,
    index_of,
    key_hashes,
    scan_tar,
    write_index,
    write_keys,
)
from jitscale.errors import DataError
from jitscale.files import atomic_write, sha256_of
from jitscale.keyed_random import Int64Array, Purpose, permutation

ORIGINAL = "original"  # a codec of `pack_shard`: the files as they came

_MOST_BYTES = 1 << 30  # of one image's file; larger files are not images, and are never loaded
_MOST_OPEN_FILES = 256  # of a process; 1024 is a usual limit
# The process is at fault, not the file: going on would drop good images.
_OUR_FAULT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)

Sample = dict[str, "str | bytes"]  # as webdataset writes it: __key__, the image under its extension, and maybe cls


@dataclass(frozen=True)
class ShardTask:
    """One shard to be written from images that lie anywhere. Small enough to be sent to another process."""

    path: Path  # of the shard
    root: str  # relative paths of sources start here
    sources: dict[int, Source]  # by number, which becomes the key
    codec: str  # one of CODECS, or ORIGINAL
    resolution: int  # pixels a side; with ORIGINAL, only smaller images are counted
    most_bad: int  # inputs that may be bad


@dataclass(frozen=True)
class PackedShard:
    """The result of a `ShardTask`."""

    record: ShardRecord
    enlarged: int  # images whose short side was smaller than the resolution
    bad: list[BadInput]  # left out


class TooManyBadError(Exception):
    """A shard was given up, because more of its inputs are bad than its task allows."""

    def __init__(self, bad: list[BadInput]) -> None:
        super().__init__(bad)
        self.bad = bad


class Images(Protocol):
    """Images by integer index, such as an array of them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> UInt8Array:
        """One image, uint8 (R, R, 3)."""


def shard_name(number: int) -> str:
    """The file name of shard `number`."""
    return f"shard-{number:06d}.tar"


def shard_number(name: str) -> int:
    """The number of the shard that `shard_name` gave this name."""
    return int(Path(name).stem.removeprefix("shard-"))


def write_shard(path: Path, samples: Iterable[Sample]) -> ShardRecord:
    """Write one shard with its index and keys; equal samples give equal bytes.

    A shard without samples is a whole tar too.
    """
    from webdataset import TarWriter  # noqa: PLC0415  # imports torch, which only processes that write shards need

    with atomic_write(path) as file, TarWriter(file, mtime=0) as tar:
        for sample in samples:
            tar.write(sample)
    found = scan_tar(path)
    write_keys(path, key_hashes(found))
    write_index(path, index_of(found, [int(sample.label or NO_LABEL) for sample in found]))
    return ShardRecord(path.name, len(found), path.stat().st_size, sha256_of(path))


def pack_shard(task: ShardTask) -> PackedShard:
    """Read, check, crop and store the images of one shard; those that cannot be used are left out and listed.

    Raises:
        TooManyBadError: more than `task.most_bad` cannot be used.
        OSError: the shard cannot be written.
        DataError: images cannot be read for a reason that lies in this process.
    """
    bad: list[BadInput] = []
    enlarged = 0

    def samples() -> Iterator[Sample]:
        nonlocal enlarged
        open_file = lru_cache(_MOST_OPEN_FILES)(partial(_open, task.root))
        for number, source in task.sources.items():
            try:
                data = _read(source, open_file)
                image = decode(data, source.extension)
                if task.codec == ORIGINAL:
                    extension = content_extension(data)
                else:
                    extension, data = encode(center_crop(image, task.resolution), task.codec)
            except ImageError as error:
                bad.append(BadInput(source.place, str(error)))
                if len(bad) > task.most_bad:
                    raise TooManyBadError(bad) from error
                continue
            enlarged += min(image.shape[:2]) < task.resolution
            sample: Sample = {"__key__": f"{number:09d}", extension: data}
            if source.label != NO_LABEL:
                sample["cls"] = str(source.label)
            yield sample

    return PackedShard(write_shard(task.path, samples()), enlarged, bad)


def write_shards(
    images: Images,
    labels: Sequence[int] | Int64Array,
    output: str | Path,
    *,
    codec: str = "png",
    samples_per_shard: int = 1000,
    class_names: list[str] | None = None,
    seed: int = 0,
) -> Manifest:
    """Write `images` in a random order as shards with indexes and a manifest. Equal input gives equal bytes.

    Args:
        images: all of one resolution.
        labels: one class an image, counted from 0.
        output: a folder, made if it is not there.
        codec: the stored form, one of `CODECS`.
        samples_per_shard: samples of every shard but the last.
        class_names: the names of the classes, recorded in the manifest.
        seed: of the order. Keys remain the indices into `images`.

    Raises:
        DataError: labels, images and class names do not fit together, or the folder already holds a manifest.
    """
    folder = Path(output)
    if (folder / MANIFEST).exists():
        raise DataError(f"{folder / MANIFEST}: the folder holds shards already; remove it or choose another output")
    if codec not in CODECS or samples_per_shard < 1:
        raise DataError(
            f"codec {codec!r}, samples_per_shard {samples_per_shard}: choose one of {', '.join(CODECS)}, and at least 1"
        )
    if not 0 < len(images) == len(labels):
        raise DataError(
            f"{len(images)} images and {len(labels)} labels: give one label an image, and at least one image"
        )
    limit = LARGEST_LABEL if class_names is None else len(class_names) - 1
    for number, label in enumerate(labels):
        if not 0 <= label <= limit:
            raise DataError(f"image {number}: label {label} is not in 0..{limit}; correct it or the class names")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder}: cannot be made ({error}); choose another folder") from error
    resolution = len(images[0])
    order = permutation(len(images), seed, Purpose.PACKING_ORDER)

    def samples(sources: Int64Array) -> Iterator[Sample]:
        for source in sources:
            image = images[source]
            progress.update()
            if image.shape[:2] != (resolution, resolution):
                raise DataError(
                    f"image {source}: has shape {image.shape}, the first one {images[0].shape}; "
                    "crop all of them to squares of one size"
                )
            extension, data = encode(image, codec)
            yield {"__key__": f"{source:09d}", extension: data, "cls": str(int(labels[source]))}

    with tqdm(total=len(order), unit="img", desc="write", delay=1) as progress:
        records = [
            write_shard(folder / shard_name(number), samples(order[first : first + samples_per_shard]))
            for number, first in enumerate(range(0, len(order), samples_per_shard))
        ]
    num_classes = int(np.max(labels)) + 1 if class_names is None else len(class_names)
    counts = np.bincount(np.asarray(labels), minlength=num_classes).tolist() if num_classes else None
    manifest = Manifest(codec, resolution, num_classes, class_names, len(order), records, class_counts=counts)
    manifest.write(folder / MANIFEST)
    return manifest


def write_shards_once(images: Images, output: Path, **options: Any) -> str:
    """`write_shards` with its options, unless `output` holds exactly these shards already; says which of both it was.

    Raises:
        DataError: `output` holds other shards; and as `write_shards`.
    """
    if not (output / MANIFEST).exists():
        manifest = write_shards(images, output=output, **options)
        return f"{output}: {manifest.total} images in {len(manifest.shards)} shards"
    with tempfile.TemporaryDirectory() as scratch:
        manifest = write_shards(images, output=scratch, **options)
    if manifest != Manifest.read(output / MANIFEST):
        raise DataError(f"{output}: holds other shards; remove the folder or choose another --output")
    return f"{output}: is there already"


def _read(source: Source, open_file: Callable[[str], OffsetReader]) -> bytes:
    """The bytes of one image. An `ImageError` is the file's fault, another `DataError` this process's."""
    try:
        file = open_file(source.path)
        size = file.status().st_size if source.size == WHOLE_FILE else source.size
        if size > _MOST_BYTES:
            raise ImageError(f"has {size} bytes; the limit is {_MOST_BYTES}")
        return file.read(source.offset, size)
    except ShortReadError as error:
        raise ImageError(str(error)) from error
    except OSError as error:
        if error.errno in _OUR_FAULT:
            raise DataError(
                f"{source.place}: cannot be read ({error.strerror}); raise the limits of the process, or use fewer "
                "workers"
            ) from error
        raise ImageError(f"cannot be read ({error.strerror})") from error


def _open(root: str, path: str) -> OffsetReader:
    if "\0" in path:
        raise ImageError("has a name that no file can have")
    file = OffsetReader(os.path.join(root, path))
    if not stat.S_ISREG(file.status().st_mode):
        raise ImageError("is no regular file")
    return file
