"""Writes images from memory as shards with a manifest; `packing_job` packs files."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from jitscale.data.images import CODECS, UInt8Array, encode
from jitscale.data.manifest import MANIFEST, Manifest
from jitscale.data.tar_index import LARGEST_LABEL
from jitscale.errors import DataError, data_error
from jitscale.keyed_random import Int64Array, Purpose, permutation
from jitscale.preparation.packing import Sample, shard_name, write_shard


class Images(Protocol):
    """Images by integer index, such as an array of them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> UInt8Array:
        """One image, uint8 (R, R, C), with 3 channels or 1."""


def write_shards(
    images: Images,
    labels: Sequence[int] | Int64Array,
    output: str | Path,
    *,
    codec: str = "png",
    samples_per_shard: int = 1000,
    class_names: list[str] | None = None,
    seed: int = 0,
    dataset: str | None = None,
) -> Manifest:
    """Write `images` in a random order as shards with indexes and a manifest. Equal input gives equal bytes.

    Raises a DataError if labels, images and class names do not fit together, or the folder already holds a manifest.

    Args:
        images: all of the same resolution and number of channels.
        labels: the class of each image, counted from 0.
        output: a folder; it is made if it does not exist.
        codec: the stored form, one of `CODECS`.
        samples_per_shard: samples in every shard except the last.
        class_names: the names of the classes, recorded in the manifest.
        seed: seed of the order. Keys are the indices into `images`.
        dataset: the name of the data, see `Manifest.dataset`.
    """
    folder = Path(output)
    if (folder / MANIFEST).exists():
        raise DataError(f"{folder / MANIFEST}: the folder holds shards already; remove it or choose another output")
    if codec not in CODECS or samples_per_shard < 1:
        given = f"codec {codec!r}, samples_per_shard {samples_per_shard}"
        raise DataError(f"{given}: choose one of {', '.join(CODECS)}, and at least 1")
    if not 0 < len(images) == len(labels):
        raise DataError(f"{len(images)} images and {len(labels)} labels: give at least one image, and each a label")
    limit = LARGEST_LABEL if class_names is None else len(class_names) - 1
    for number, label in enumerate(labels):
        if not 0 <= label <= limit:
            raise DataError(f"image {number}: label {label} is not in 0..{limit}; correct it or the class names")
    with data_error(f"{folder}: cannot be made", "choose another folder"):
        folder.mkdir(parents=True, exist_ok=True)
    shape = images[0].shape
    order = permutation(len(images), seed, Purpose.PACKING_ORDER)

    def samples(sources: Int64Array) -> Iterator[Sample]:
        for source in sources:
            image = images[source]
            progress.update()
            if image.shape != shape or shape[:1] != shape[1:2]:
                shapes = f"has shape {image.shape}, the first one {shape}"
                raise DataError(f"image {source}: {shapes}; crop all of them to squares of one size and channels")
            extension, data = encode(image, codec)
            yield {"__key__": f"{source:09d}", extension: data, "cls": str(int(labels[source]))}

    with tqdm(total=len(order), unit="img", desc="write", delay=1) as progress:
        records = [
            write_shard(folder / shard_name(number), samples(order[first : first + samples_per_shard]))
            for number, first in enumerate(range(0, len(order), samples_per_shard))
        ]
    num_classes = int(np.max(labels)) + 1 if class_names is None else len(class_names)
    counts = np.bincount(np.asarray(labels), minlength=num_classes).tolist() if num_classes else None
    manifest = Manifest(
        codec,
        shape[0],
        num_classes,
        class_names,
        len(order),
        records,
        class_counts=counts,
        channels=shape[2],
        dataset=dataset,
    )
    manifest.write(folder / MANIFEST)
    return manifest


def write_shards_once(images: Images, output: Path, **options: Any) -> str:
    """Call `write_shards`, unless `output` holds exactly these shards already. Returns a line that says which.

    Raises a DataError if `output` holds other shards, and as `write_shards` does.
    """
    if not (output / MANIFEST).exists():
        manifest = write_shards(images, output=output, **options)
        return f"{output}: {manifest.total} images in {len(manifest.shards)} shards"
    with tempfile.TemporaryDirectory() as scratch:
        manifest = write_shards(images, output=scratch, **options)
    if manifest != Manifest.read(output / MANIFEST):
        raise DataError(f"{output}: holds other shards; remove the folder or choose another --output")
    return f"{output}: is there already"
