"""Files of rows with images, as pyarrow and the library `datasets` write them."""

import json
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from jitscale.preparation.finding import find_sources
from jitscale.preparation.forms.search import FindOptions
from jitscale.preparation.reading import SourceReader
from jitscale.preparation.sources import SourceTable
from tests.support.pictures import file_bytes, noise

SIZE = 8  # in pixels a side
NAMES = ["zebra", "ant", "moth"]  # in the order of their numbers; the sorted order differs
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def pictures(count: int, first: int = 0) -> npt.NDArray[np.uint8]:
    """Images (count, SIZE, SIZE, 3) with different pixels."""
    return np.stack([noise(first + number, SIZE, SIZE) for number in range(count)])


def data_set(labels: Sequence[int], first: int = 0) -> datasets.Dataset:
    """A data set of the library `datasets` that holds the bytes of its images."""
    images = [Image.fromarray(image) for image in pictures(len(labels), first)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    return datasets.Dataset.from_dict({"image": images, "label": list(labels)}, features=features)


def metadata(**features: object) -> dict[str, str]:
    """The metadata of a file in which `datasets` describes its columns."""
    return {"huggingface": json.dumps({"info": {"features": features}})}


def rows(count: int, *, paths: Sequence[str | None] | None = None, **columns: object) -> pa.Table:
    """A table of images and other columns, without such metadata."""
    names = paths or [None] * count
    images = [{"bytes": file_bytes(image), "path": name} for image, name in zip(pictures(count), names, strict=True)]
    return pa.table({"image": pa.array(images, IMAGE), **columns})


def write(table: pa.Table, path: Path, **options: object) -> Path:
    """Write a Parquet file and its folder; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return path


def found(*inputs: Path | str, **options: object) -> SourceTable:
    return find_sources(list(map(str, inputs)), FindOptions(**options))  # type: ignore[arg-type]


def labels_of(*inputs: Path | str, **options: object) -> list[int]:
    """The label of each image, in order."""
    labels: list[int] = found(*inputs, **options).table["label"].tolist()
    return labels


def stored(table: SourceTable) -> list[bytes]:
    """The bytes of all images, read in order."""
    reader = SourceReader("/")
    return [reader.read(table[number])[0] for number in range(len(table))]
