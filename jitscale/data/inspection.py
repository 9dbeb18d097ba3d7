"""What a folder of tars holds: counts, classes and their balance, statistics of a random sample, a contact sheet."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from jitscale.data.find import Tars
from jitscale.data.images import UInt8Array, center_crop, decode
from jitscale.data.manifest import BadInput, ShardRecord, content_hash
from jitscale.data.processes import in_processes
from jitscale.data.survey import by_place, number_labels, scan_shards
from jitscale.data.tar_index import Defect, IndexArray, OffsetReader, index_path, map_index
from jitscale.errors import DataError
from jitscale.files import atomic_write
from jitscale.keyed_random import Float64Array, Int64Array, Purpose, hash64

Record = tuple[int, int, int, bytes]  # of an index: offset, size, label, extension
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

SHEET_TILES = 8  # a side of the contact sheet
TILE = 80  # pixels a side
CAPTION = 14  # pixels of height below a tile

_SMALL_SIDES = (256, 512)  # the resolutions of the recipe: what is smaller has to be enlarged
_CHUNK = 32  # images a task: a few MB and some tens of milliseconds
_GAP = 4  # pixels between tiles
_BACKGROUND, _INK, _MISSING = (255, 255, 255), (0, 0, 0), (200, 200, 200)
_LARGEST_SHEET = 1_000_000  # bytes; beyond, 256 colours have to do


@dataclass(frozen=True)
class Collection:
    """Shards as their manifest and indices describe them; images have not been looked at."""

    paths: list[Path]  # of the tars that are there
    indices: list[IndexArray]  # one a tar
    bytes: int
    codec: str | None  # None where there is no manifest, as all that follows down to `crop`
    resolution: int | None
    crop: str | None
    num_classes: int
    class_names: list[str] | None
    manifest_hash: str  # as `ShardSet` computes it
    bad: list[BadInput]
    enlarged: int
    defects: list[Defect]  # of tars that were scanned because no index vouches for them; sorted

    @property
    def samples(self) -> int:
        return sum(map(len, self.indices))

    def labels(self) -> npt.NDArray[np.int32]:
        """Of all samples, in the order of the shards."""
        return np.concatenate([np.empty(0, np.int32), *(index["label"] for index in self.indices)])

    def class_text(self, label: int) -> str:
        """The number of a class, with its name if that says more."""
        name = self.class_names[label] if self.class_names and label < len(self.class_names) else str(label)
        return name if name == str(label) else f"{label} {name}"


@dataclass(frozen=True)
class Look:
    """What a sample of the images looks like. Every image weighs the same, whatever its size."""

    images: int
    undecodable: list[Defect]  # not among `images`
    sizes: Int64Array  # (images, 2): width and height in pixels
    means: Float64Array  # (images, 3): of each channel, in [0, 255]
    squares: Float64Array  # (images, 3): mean of the squared values
    grey: int  # images whose channels are all equal

    def mean(self) -> Float64Array:
        """(3,), in [0, 255]."""
        return np.asarray(self.means.mean(0))

    def deviation(self) -> Float64Array:
        """The standard deviation over all pixels of all images, (3,), in [0, 255]."""
        return np.asarray(np.sqrt(np.maximum(self.squares.mean(0) - self.means.mean(0) ** 2, 0)))


@dataclass(frozen=True)
class _Task:
    path: Path
    rows: list[Record]


@dataclass(frozen=True)
class _Seen:
    images: list[tuple[int, int, Float64Array, Float64Array, bool]]  # width, height, mean, mean square, grey
    undecodable: list[Defect]


def collect(tars: Tars, workers: int) -> Collection:
    """The shards of `tars`. A tar is scanned unless the manifest names it and its index lies beside it.

    Raises:
        DataError: a process died. A tar that is missing or damaged is counted among the defects.
    """
    manifest = tars.manifest
    records = {} if manifest is None else {tars.folder / record.name: record for record in manifest.shards}
    paths = list(records) if tars.whole_folder and records else tars.paths
    defects = [Defect(path, None, "is missing; copy it again") for path in paths if not path.is_file()]
    paths = [path for path in paths if path.is_file()]
    indices: dict[Path, IndexArray] = {}
    for path in paths:
        if path in records and index_path(path).exists():
            try:
                indices[path] = map_index(index_path(path))
            except DataError as error:
                defects.append(Defect(path, None, str(error)))
    to_scan = [path for path in paths if path not in indices]
    class_names, num_classes = (None, 0) if manifest is None else (manifest.class_names, manifest.num_classes)
    if to_scan:
        scans = scan_shards(to_scan, workers, content=False)
        labels = number_labels(scans, class_names)
        indices.update(zip(to_scan, labels.indices, strict=True))
        defects += [defect for scan in scans for defect in scan.defects] + labels.defects
        if manifest is None:
            class_names, num_classes = labels.class_names, labels.num_classes
    sizes = [path.stat().st_size for path in paths]
    hashes = [records[path].sha256 if path in records else "" for path in paths]
    identity = [
        ShardRecord(path.name, len(indices[path]), size, sha256)
        for path, size, sha256 in zip(paths, sizes, hashes, strict=True)
    ]
    return Collection(
        paths,
        [indices[path] for path in paths],
        sum(sizes),
        None if manifest is None else manifest.codec,
        None if manifest is None else manifest.resolution,
        None if manifest is None else manifest.crop,
        num_classes,
        class_names,
        content_hash(identity),
        [] if manifest is None else manifest.bad,
        0 if manifest is None else manifest.enlarged,
        by_place(defects),
    )


def balance(collection: Collection) -> dict[str, Any]:
    """How many samples each class has: the classes with the fewest and most, the median, and who has none."""
    labels = collection.labels()
    num_classes = collection.num_classes
    labelled = labels[(labels >= 0) & (labels < num_classes)]
    counts = np.bincount(labelled, minlength=num_classes)
    result: dict[str, Any] = {"number": num_classes, "samples_without_label": len(labels) - len(labelled)}
    if num_classes:
        smallest, largest = int(counts.argmin()), int(counts.argmax())
        result["smallest"] = {"class": collection.class_text(smallest), "samples": int(counts[smallest])}
        result["median_samples"] = float(np.median(counts))
        result["largest"] = {"class": collection.class_text(largest), "samples": int(counts[largest])}
        result["empty"] = [collection.class_text(int(label)) for label in np.flatnonzero(counts == 0)]
    return result


def extensions(collection: Collection) -> dict[str, int]:
    """How many images there are of each extension."""
    counts: Counter[str] = Counter()
    for index in collection.indices:
        found, numbers = np.unique(index["extension"], return_counts=True)
        counts.update({name.decode(): int(number) for name, number in zip(found, numbers, strict=True)})
    return dict(counts.most_common())


def drawn(total: int, count: int, seed: int) -> Int64Array:
    """`count` of range(total) in rising order, one at random of each of `count` equal parts; all if there are fewer."""
    count = min(count, total)
    edges = np.arange(count + 1) * total // max(count, 1)
    inside = hash64(seed, Purpose.INSPECTED_SAMPLES, np.arange(count)) % np.diff(edges).astype(np.uint64)
    return edges[:-1] + inside.astype(np.int64)


def look(collection: Collection, count: int, seed: int, workers: int) -> Look:
    """Decode `count` random images of the collection in parallel, the same ones for equal seeds.

    Raises:
        DataError: a process died. Images that cannot be decoded are counted.
    """
    tasks = [
        _Task(collection.paths[shard], collection.indices[shard][rows[first : first + _CHUNK]].tolist())
        for shard, rows in _by_shard(collection, drawn(collection.samples, count, seed))
        for first in range(0, len(rows), _CHUNK)
    ]
    seen: dict[int, _Seen] = {}
    with tqdm(total=sum(len(task.rows) for task in tasks), unit="img", desc="decode") as progress:
        for number, result in in_processes(_see, tasks, workers):
            seen[number] = result
            progress.update(len(tasks[number].rows))
    images = [image for number in range(len(tasks)) for image in seen[number].images]
    return Look(
        len(images),
        [defect for number in range(len(tasks)) for defect in seen[number].undecodable],
        np.array([(width, height) for width, height, *_ in images], np.int64).reshape(-1, 2),
        np.array([image[2] for image in images], np.float64).reshape(-1, 3),
        np.array([image[3] for image in images], np.float64).reshape(-1, 3),
        sum(grey for *_, grey in images),
    )


def statistics(seen: Look) -> dict[str, Any]:
    """Sizes and colours of what was looked at; colours both in [0, 255] and as the network sees them, in [-1, 1]."""
    if not seen.images:
        return {}
    short = seen.sizes.min(1)
    mean, deviation = seen.mean(), seen.deviation()
    return {
        "width": _spread(seen.sizes[:, 0]),
        "height": _spread(seen.sizes[:, 1]),
        "share_of_short_sides_below": {str(side): float((short < side).mean()) for side in _SMALL_SIDES},
        "rgb_mean_255": mean.tolist(),
        "rgb_std_255": deviation.tolist(),
        "rgb_mean": (mean / 127.5 - 1).tolist(),
        "rgb_std": (deviation / 127.5).tolist(),
        "share_grey": seen.grey / seen.images,
    }


def contact_sheet(collection: Collection, path: Path, seed: int) -> None:
    """Write a PNG of `SHEET_TILES` x `SHEET_TILES` images, of classes at equal distances, with the class below each.

    With fewer classes than tiles, several images of each; without classes, random images.

    Raises:
        DataError: there are no samples, or the file cannot be written.
    """
    chosen = _for_the_sheet(collection, seed)
    if not len(chosen):
        raise DataError(f"{path}: there is no sample to put on a contact sheet; choose other shards")
    tiles = {}
    for shard, rows in _by_shard(collection, np.sort(chosen)):
        records = collection.indices[shard][rows].tolist()
        file = OffsetReader(collection.paths[shard])
        for sample, record in zip(_starts(collection)[shard] + rows, records, strict=True):
            tiles[int(sample)] = (_tile(file, record), record[2])

    wide, high = TILE + _GAP, TILE + CAPTION + _GAP
    sheet = Image.new("RGB", (SHEET_TILES * wide + _GAP, SHEET_TILES * high + _GAP), _BACKGROUND)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for number, sample in enumerate(chosen.tolist()):
        image, label = tiles[sample]
        left, top = _GAP + number % SHEET_TILES * wide, _GAP + number // SHEET_TILES * high
        if image is None:
            draw.rectangle((left, top, left + TILE - 1, top + TILE - 1), _MISSING)
        else:
            sheet.paste(Image.fromarray(image), (left, top))
        caption = "undecodable" if image is None else collection.class_text(label) if label >= 0 else ""
        draw.text((left, top + TILE), _fitting(caption, font), _INK, font)
    _save(sheet, path)


def _see(task: _Task) -> _Seen:
    """Some images of one shard, in any process."""
    images, undecodable = [], []
    try:
        file = OffsetReader(task.path)
        for record in task.rows:
            try:
                image = _read(file, record)
            except DataError as error:
                undecodable.append(Defect(task.path, record[0], str(error)))
                continue
            levels = np.arange(256)
            histograms = [np.bincount(image[..., channel].ravel(), minlength=256) for channel in range(3)]
            shares = np.array(histograms) / (image.shape[0] * image.shape[1])
            grey = bool((image == image[..., :1]).all())
            images.append((image.shape[1], image.shape[0], shares @ levels, shares @ levels**2, grey))
    except OSError as error:
        undecodable.append(Defect(task.path, None, f"cannot be read ({error})"))
    return _Seen(images, undecodable)


def _read(file: OffsetReader, record: Record) -> UInt8Array:
    """The image of an `INDEX` record.

    Raises:
        DataError: it cannot be decoded, or the index lies.
    """
    offset, size, _, extension = record
    try:
        data = file.read(offset, size)
    except OSError as error:
        raise DataError(f"cannot be read ({error})") from error
    return decode(data, extension.decode(errors="replace"))


def _tile(file: OffsetReader, record: Record) -> UInt8Array | None:
    try:
        return center_crop(_read(file, record), TILE)
    except DataError:
        return None


def _starts(collection: Collection) -> Int64Array:
    """The number of every shard's first sample."""
    lengths = np.array([len(index) for index in collection.indices], np.int64)
    return np.cumsum(lengths) - lengths


def _by_shard(collection: Collection, samples: Int64Array) -> Iterator[tuple[int, Int64Array]]:
    """Shard by shard, those of `samples` (in rising order) that lie in it, counted from its first one."""
    starts = _starts(collection)
    ends = np.searchsorted(samples, [*starts[1:], collection.samples])
    first = 0
    for shard, end in enumerate(ends.tolist()):
        if end > first:
            yield shard, samples[first:end] - starts[shard]
        first = end


def _for_the_sheet(collection: Collection, seed: int) -> Int64Array:
    """The samples on the contact sheet in the order of their tiles, each at most once."""
    tiles = SHEET_TILES**2
    labels = collection.labels()
    present = np.unique(labels[labels >= 0])
    if not len(present):
        return drawn(collection.samples, tiles, seed)
    classes = Counter(present[np.arange(tiles) * len(present) // tiles].tolist())
    chosen: list[Int64Array] = []
    for label, count in classes.items():
        candidates = np.flatnonzero(labels == label)
        chosen.append(candidates[drawn(len(candidates), count, seed)])
    return np.concatenate(chosen)


def _fitting(text: str, font: Font) -> str:
    """As much of `text` as fits below a tile; Pillow's built-in font knows Latin letters."""
    text = text.encode("latin-1", errors="replace").decode("latin-1")
    while font.getlength(text) > TILE:
        text = text[:-1]
    return text


def _save(sheet: Image.Image, path: Path) -> None:
    stream = io.BytesIO()
    sheet.save(stream, "PNG", optimize=True)
    if stream.tell() > _LARGEST_SHEET:
        stream = io.BytesIO()
        sheet.quantize(256).save(stream, "PNG", optimize=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(stream.getvalue())
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error}); choose another file") from error


def _spread(values: Int64Array) -> dict[str, float]:
    return {"min": int(values.min()), "median": float(np.median(values)), "max": int(values.max())}
