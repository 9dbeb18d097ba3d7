"""Writing shards: tars that webdataset reads, each with its index beside it, and the manifest of all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from webdataset.writer import TarWriter

from jitscale.data.images import CODECS, UInt8Array, encode
from jitscale.data.manifest import MANIFEST, Manifest, ShardRecord
from jitscale.data.tar_index import LARGEST_LABEL, index_tar, write_index
from jitscale.errors import DataError
from jitscale.files import appearing_whole, sha256_of
from jitscale.keyed_random import Int64Array, Purpose, permutation

Sample = dict[str, "str | bytes"]  # as webdataset writes it: __key__, the image under its extension, and maybe cls


def shard_name(number: int) -> str:
    """The file name of shard `number`."""
    return f"shard-{number:06d}.tar"


def write_shard(path: Path, samples: Iterable[Sample]) -> ShardRecord:
    """Write one shard and its index; equal samples give equal bytes. A shard without samples is a whole tar too."""
    with appearing_whole(path) as file, TarWriter(file, encoder=False, mtime=0) as tar:
        for sample in samples:
            tar.write(sample)
    index = index_tar(path)
    write_index(path, index)
    return ShardRecord(path.name, len(index), path.stat().st_size, sha256_of(path))


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

    def samples(sources: Int64Array) -> Iterator[Sample]:
        for source in sources:
            image = images[source]
            if image.shape[:2] != (resolution, resolution):
                raise DataError(
                    f"image {source}: has shape {image.shape}, the first one {images[0].shape}; "
                    "crop all of them to squares of one size"
                )
            extension, data = encode(image, codec)
            yield {"__key__": f"{source:09d}", extension: data, "cls": str(int(labels[source])).encode()}

    records = [
        write_shard(folder / shard_name(number), samples(order[first : first + samples_per_shard]))
        for number, first in enumerate(range(0, len(order), samples_per_shard))
    ]
    num_classes = int(np.max(labels)) + 1 if class_names is None else len(class_names)
    manifest = Manifest(codec, resolution, num_classes, class_names, len(order), records)
    manifest.write(folder / MANIFEST)
    return manifest


def _check_labels(labels: Sequence[int] | Int64Array, images: int, class_names: list[str] | None) -> None:
    if images == 0 or images != len(labels):
        raise DataError(f"{images} images and {len(labels)} labels: give one label an image, and at least one image")
    limit = LARGEST_LABEL if class_names is None else len(class_names) - 1
    for number, label in enumerate(labels):
        if not 0 <= label <= limit:
            raise DataError(f"image {number}: label {label} is not in 0..{limit}; correct it or the class names")
