"""Describes a folder of tars: counts, classes and their balance, statistics of a random sample, a contact sheet."""

import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from jitscale.data.background import WHITE, Background, parse_background
from jitscale.data.find import Tars
from jitscale.data.images import RGB, UInt8Array, center_crop, decode
from jitscale.data.manifest import Manifest, ShardRecord, content_hash, label_key
from jitscale.data.tar_index import Defect, IndexArray, OffsetReader, count_classes, index_path, map_index
from jitscale.errors import DataError
from jitscale.keyed_random import Int64Array, Purpose, hash64
from jitscale.preparation.processes import in_processes
from jitscale.preparation.survey import by_place, scan_shards

Record = tuple[int, int, int, bytes]  # an entry of an index: offset, size, label, extension

# One image: its size in pixels; mean and mean square of each channel, in [0, 255]; whether all channels are equal.
IMAGE = np.dtype([("width", "<i8"), ("height", "<i8"), ("mean", "<f8", RGB), ("square", "<f8", RGB), ("grey", "?")])

SHEET_TILES = 8  # tiles per side of the contact sheet
TILE = 80  # pixels per side
CAPTION = 14  # pixels of height below a tile

_SMALL_SIDES = (256, 512)  # the resolutions of the recipe: smaller images are enlarged
_CHUNK = 32  # images a task: a few MB and some tens of milliseconds
_GAP = 4  # pixels between tiles
_BACKGROUND, _INK, _MISSING = (255, 255, 255), (0, 0, 0), (200, 200, 200)
_LARGEST_SHEET = 1_000_000  # bytes; a larger sheet is reduced to 256 colours


@dataclass(frozen=True)
class Collection:
    """Shards as their manifest and indices describe them. No image has been opened."""

    paths: list[Path]  # paths of the tars that exist
    indices: list[IndexArray]  # one per tar
    backgrounds: list[Background]  # background of transparent images, one per tar
    bytes: int
    manifest: Manifest  # without one: the classes of a scan, and an empty codec
    manifest_hash: str  # as `ShardSet` computes it
    defects: list[Defect]  # sorted; tars that are missing, or that were scanned because they have no index

    @property
    def samples(self) -> int:
        return sum(map(len, self.indices))

    def class_text(self, label: int) -> str:
        """The number of a class, and its name if it differs from the number."""
        names = self.manifest.class_names or []
        name = names[label] if label < len(names) else str(label)
        return name if name == str(label) else f"{label} {name}"


class Look(NamedTuple):
    """Facts about a random sample of the images."""

    found: npt.NDArray[np.void]  # an `IMAGE` record of each that was decoded
    undecodable: list[Defect]  # not among `found`


def collect(tars: Tars, workers: int) -> Collection:
    """The shards of `tars`. A tar is scanned unless the manifest names it and its index lies next to it.

    Tars that are missing or damaged are counted among the defects. Raises a DataError if a process died.
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
    class_names = None if manifest is None else manifest.class_names
    scans, classes, wrong = scan_shards(to_scan, class_names, workers, content=False, key=label_key(manifest))
    indices.update((scan.path, scan.index) for scan in scans)
    found = [
        ShardRecord(path.name, len(indices[path]), path.stat().st_size, records[path].sha256 if path in records else "")
        for path in paths
    ]
    behind = WHITE if manifest is None else parse_background(manifest.background)
    backgrounds = [behind if path in records else WHITE for path in paths]
    return Collection(
        paths,
        [indices[path] for path in paths],
        backgrounds,
        sum(record.bytes for record in found),
        manifest or Manifest("", None, classes.number, classes.names, 0, []),
        content_hash(zip(found, backgrounds, strict=True)),
        by_place([*defects, *wrong]),
    )


def balance(collection: Collection) -> dict[str, Any]:
    """The balance of classes: those with the fewest and most samples, the median, and those without samples."""
    num_classes = collection.manifest.num_classes
    counts = np.array(count_classes(collection.indices, num_classes) or [], np.int64)
    result: dict[str, Any] = {"number": num_classes, "samples_without_label": collection.samples - int(counts.sum())}
    if num_classes:
        smallest, largest = int(counts.argmin()), int(counts.argmax())
        result["smallest"] = {"class": collection.class_text(smallest), "samples": int(counts[smallest])}
        result["median_samples"] = float(np.median(counts))
        result["largest"] = {"class": collection.class_text(largest), "samples": int(counts[largest])}
        result["empty"] = [collection.class_text(int(label)) for label in np.flatnonzero(counts == 0)]
    return result


def extensions(collection: Collection) -> dict[str, int]:
    """The number of images of each extension."""
    counts = Counter(chain.from_iterable(index["extension"].tolist() for index in collection.indices))
    return {name.decode(): number for name, number in counts.most_common()}


def random_positions(total: int, count: int, seed: int) -> Int64Array:
    """`count` random numbers of range(total), rising: one from each of `count` equal parts; all if there are fewer."""
    count = min(count, total)
    edges = np.arange(count + 1) * total // max(count, 1)
    inside = hash64(seed, Purpose.INSPECTED_SAMPLES, np.arange(count)) % np.diff(edges).astype(np.uint64)
    return edges[:-1] + inside.astype(np.int64)


def look(collection: Collection, count: int, seed: int, workers: int) -> Look:
    """Decode `count` random images of the collection in parallel, the same ones for equal seeds.

    Raises a DataError if a process died.
    """
    chosen = random_positions(collection.samples, count, seed)
    tasks = [
        (
            collection.paths[shard],
            collection.backgrounds[shard],
            collection.indices[shard][rows[first : first + _CHUNK]].tolist(),
        )
        for shard, _, rows in _by_shard(collection, chosen)
        for first in range(0, len(rows), _CHUNK)
    ]
    looks: dict[int, Look] = {}
    with tqdm(total=len(chosen), unit="img", desc="decode") as progress:
        for number, looks[number] in in_processes(_look_at, tasks, workers):
            progress.update(len(tasks[number][2]))
    in_order = [looks[number] for number in range(len(tasks))]
    found = np.concatenate([np.empty(0, IMAGE), *(one.found for one in in_order)])
    return Look(found, [defect for one in in_order for defect in one.undecodable])


def statistics(seen: Look) -> dict[str, Any]:
    """Sizes and colours of the sample; colours in [0, 255], and in [-1, 1] as the network sees them.

    Every image weighs the same, whatever its size.
    """
    found = seen.found
    if not len(found):
        return {}
    mean = found["mean"].mean(0)
    deviation = np.sqrt(np.maximum(found["square"].mean(0) - mean**2, 0))
    short = np.minimum(found["width"], found["height"])
    spread = {
        side: {"min": int(found[side].min()), "median": float(np.median(found[side])), "max": int(found[side].max())}
        for side in ("width", "height")
    }
    return {
        **spread,
        "share_of_short_sides_below": {str(side): float((short < side).mean()) for side in _SMALL_SIDES},
        "rgb_mean_255": mean.tolist(),
        "rgb_std_255": deviation.tolist(),
        "rgb_mean": (mean / 127.5 - 1).tolist(),
        "rgb_std": (deviation / 127.5).tolist(),
        "share_grey": float(found["grey"].mean()),
    }


def contact_sheet(collection: Collection, seed: int) -> bytes:
    """A PNG of `SHEET_TILES` x `SHEET_TILES` images, of classes at equal distances, with the class below each.

    If there are fewer classes than tiles, a class has several tiles. Without classes, the images are random. Raises a
    DataError if there are no samples.
    """
    chosen = _for_the_sheet(collection, seed)
    if not len(chosen):
        raise DataError("there is no sample to put on a contact sheet; choose other shards")
    wide, high = TILE + _GAP, TILE + CAPTION + _GAP
    sheet = Image.new("RGB", (SHEET_TILES * wide + _GAP, SHEET_TILES * high + _GAP), _BACKGROUND)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    tile_of = {sample: tile for tile, sample in enumerate(chosen.tolist())}
    for shard, samples, rows in _by_shard(collection, np.sort(chosen)):
        tar = OffsetReader(collection.paths[shard])
        for sample, record in zip(samples.tolist(), collection.indices[shard][rows].tolist(), strict=True):
            row, column = divmod(tile_of[sample], SHEET_TILES)
            left, top = _GAP + column * wide, _GAP + row * high
            caption = collection.class_text(record[2]) if record[2] >= 0 else ""
            try:
                sheet.paste(
                    Image.fromarray(center_crop(_read(tar, record, collection.backgrounds[shard]), TILE)), (left, top)
                )
            except DataError:
                caption = "undecodable"
                draw.rectangle((left, top, left + TILE - 1, top + TILE - 1), _MISSING)
            draw.text((left, top + TILE), _fitting(caption, font), _INK, font)
    stream = io.BytesIO()
    sheet.save(stream, "PNG", optimize=True)
    if stream.tell() > _LARGEST_SHEET:
        stream = io.BytesIO()
        sheet.quantize(256).save(stream, "PNG", optimize=True)
    return stream.getvalue()


def _look_at(task: tuple[Path, Background, list[Record]]) -> Look:
    """Look at some images of one shard, in any process."""
    path, background, records = task
    images, undecodable = [], []
    levels = np.arange(256)
    try:
        file = OffsetReader(path)
    except OSError as error:
        return Look(np.empty(0, IMAGE), [Defect(path, None, f"cannot be read ({error})")])
    for record in records:
        try:
            image = _read(file, record, background)
        except DataError as error:
            undecodable.append(Defect(path, record[0], str(error)))
            continue
        height, width = image.shape[:2]
        histograms = [np.bincount(image[..., channel].ravel(), minlength=256) for channel in range(RGB)]
        shares = np.array(histograms) / (height * width)
        images.append((width, height, shares @ levels, shares @ levels**2, (image == image[..., :1]).all()))
    return Look(np.array(images, IMAGE), undecodable)


def _read(file: OffsetReader, record: Record, background: Background) -> UInt8Array:
    """The image (H, W, 3) of an `INDEX` record. Raises a DataError if it cannot be decoded, or the index is wrong."""
    offset, size, _, extension = record
    try:
        data = file.read(offset, size)
    except OSError as error:
        raise DataError(f"cannot be read ({error})") from error
    return decode(data, extension.decode(errors="replace"), background=background)


def _by_shard(collection: Collection, samples: Int64Array) -> Iterator[tuple[int, Int64Array, Int64Array]]:
    """For each shard: its number, those of `samples` (rising) that it holds, and their rows in its index."""
    lengths = [len(index) for index in collection.indices]
    ends = np.cumsum(lengths, dtype=np.int64)
    for shard, found in enumerate(np.split(samples, np.searchsorted(samples, ends[:-1]))):
        if len(found):
            yield shard, found, found - (ends[shard] - lengths[shard])


def _for_the_sheet(collection: Collection, seed: int) -> Int64Array:
    """The samples on the contact sheet in the order of their tiles, each at most once."""
    tiles = SHEET_TILES**2
    labels = np.concatenate([np.empty(0, np.int32), *(index["label"] for index in collection.indices)])
    present = np.unique(labels[labels >= 0])
    if not len(present):
        return random_positions(collection.samples, tiles, seed)
    classes, counts = np.unique(present[np.arange(tiles) * len(present) // tiles], return_counts=True)
    chosen: list[Int64Array] = []
    for label, count in zip(classes, counts.tolist(), strict=True):
        members = np.flatnonzero(labels == label)
        chosen.append(members[random_positions(len(members), count, seed)])
    return np.concatenate(chosen)


def _fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """As much of `text` as fits below a tile. Pillow's built-in font has only Latin letters."""
    text = text.encode("latin-1", errors="replace").decode("latin-1")
    while font.getlength(text) > TILE:
        text = text[:-1]
    return text
