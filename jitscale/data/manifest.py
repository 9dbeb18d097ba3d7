"""The manifest of one folder of shards. It is written last, so a folder without a manifest is not complete."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jitscale.data.background import WHITE, Background, parse_background
from jitscale.data.images import CHANNELS, RGB
from jitscale.data.tar_labels import CLS, LabelKey
from jitscale.errors import DataError, data_error
from jitscale.files import atomic_write

MANIFEST = "manifest.json"
LARGEST_MANIFEST = 1 << 27  # bytes; about 800,000 shards


@dataclass(frozen=True)
class ShardRecord:
    """The manifest's entry for one shard."""

    name: str  # file name in the manifest's folder
    samples: int
    bytes: int
    sha256: str  # empty if unknown


@dataclass(frozen=True)
class BadInput:
    """An image that was left out when the shards were written."""

    source: str  # its origin: a path, or a tar and the byte in it
    reason: str


@dataclass(frozen=True)
class Manifest:
    """The content of a folder of shards."""

    codec: str  # raw, png, webp, jpeg; original: the files unchanged; foreign: shards of another program
    resolution: int | None  # pixels per side of every image; None: original sizes, the reader crops
    num_classes: int  # labels are below it; 0: no labels
    class_names: list[str] | None
    total: int  # samples
    shards: list[ShardRecord]
    crop: str | None = None  # adm: the crop of arXiv 2105.05233 (`images.center_crop`); None: no crop
    enlarged: int = 0  # images whose short side was smaller than `resolution`
    bad: list[BadInput] = field(default_factory=list)
    class_counts: list[int] | None = field(default=None, compare=False)  # samples of each class; None if not counted
    background: str = "white"  # colour behind transparent images, as text for `parse_background`
    transparent: int | None = None  # images with transparent pixels; None if not counted
    channels: int = RGB  # channels of every image, unless the codec is original or foreign
    # digits, glyphs: images that tools of this project drew; None: other images.
    dataset: str | None = field(default=None, compare=False)
    label_key: str = "cls"  # location of the labels, as text for `LabelKey`

    @classmethod
    def read(cls, source: Path | str, content: bytes | None = None) -> Manifest:
        """The manifest in the file `source`, or in `content` that was read from there.

        Raises a DataError if it is missing or damaged, or contradicts itself.
        """
        damage = (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError)
        unread, remedy = f"{source}: cannot be read as a manifest", "write the shards again"
        if content is None:
            with data_error(unread, remedy), Path(source).open("rb") as file:
                content = file.read(LARGEST_MANIFEST + 1)
        if len(content) > LARGEST_MANIFEST:
            raise DataError(f"{source}: has more than {LARGEST_MANIFEST} bytes, too many for a manifest; {remedy}")
        with data_error(unread, remedy, damage):
            values = json.loads(content.decode())
            shards = [ShardRecord(**record) for record in values.pop("shards")]
            bad = [BadInput(**entry) for entry in values.pop("bad", [])]
            manifest = cls(shards=shards, bad=bad, **values)
        if wrong := _wrong_value(manifest):
            raise DataError(f"{source}: {wrong}; write it again")
        return manifest

    def write(self, path: Path) -> None:
        """Write the manifest to `path`. Equal manifests give equal bytes."""
        with atomic_write(path) as file:
            file.write(json.dumps(asdict(self), indent=1).encode())


def _wrong_value(manifest: Manifest) -> str:
    """The first field whose type or value is impossible, in words; empty if there is none."""

    def is_count(value: object, least: int = 0) -> bool:
        return type(value) is int and value >= least

    def is_list(values: object, is_sound: Callable[[Any], bool]) -> bool:
        return values is None or (isinstance(values, list) and all(map(is_sound, values)))

    def is_background(value: object) -> bool:
        try:
            return isinstance(value, str) and bool(parse_background(value))
        except DataError:
            return False

    def is_label_key(value: object) -> bool:
        with suppress(DataError):
            return isinstance(value, str) and bool(LabelKey.parse(value))
        return False

    sound = {
        "num_classes": (is_count(manifest.num_classes), "a count"),
        "total": (is_count(manifest.total), "a count"),
        "enlarged": (is_count(manifest.enlarged), "a count"),
        "resolution": (manifest.resolution is None or is_count(manifest.resolution, 1), "a number of pixels or null"),
        "codec": (isinstance(manifest.codec, str), "a name"),
        "dataset": (manifest.dataset is None or isinstance(manifest.dataset, str), "a name or null"),
        "label_key": (is_label_key(manifest.label_key), "cls, json:FIELD or none"),
        "class_names": (is_list(manifest.class_names, lambda name: isinstance(name, str)), "a list of names"),
        "class_counts": (is_list(manifest.class_counts, is_count), "a list of counts"),
        "background": (is_background(manifest.background), "white, black, drop or R,G,B"),
        "transparent": (manifest.transparent is None or is_count(manifest.transparent), "a count or null"),
        "channels": (is_count(manifest.channels) and manifest.channels in CHANNELS, "1 or 3"),
    }
    for name, (is_sound, expected) in sound.items():
        if not is_sound:
            return f"{name} is {getattr(manifest, name)!r}, not {expected}"
    seen: set[str] = set()
    for record in manifest.shards:
        if not isinstance(record.name, str) or not isinstance(record.sha256, str):
            return f"a shard's name is {record.name!r} and its sha256 {record.sha256!r}, not text"
        if not is_count(record.samples) or not is_count(record.bytes):
            return f"{record.name} has {record.samples!r} samples in {record.bytes!r} bytes, and both must be counts"
        if Path(record.name).name != record.name:
            return f"names {record.name!r}, which is not a file name"
        if record.name in seen:
            return f"names {record.name} twice; every sample must come once per epoch"
        seen.add(record.name)
    counted = sum(record.samples for record in manifest.shards)
    return "" if counted == manifest.total else f"its shards have {counted} samples, but its total is {manifest.total}"


def label_key(manifest: Manifest | None) -> LabelKey:
    """The location of the labels of shards; members `cls` if there is no manifest."""
    return CLS if manifest is None else LabelKey.parse(manifest.label_key)


def read_class_names(path: Path) -> list[str]:
    """The class names in a text file, one per line, in the order of the class numbers.

    Raises a DataError if the file cannot be read, or if a name is empty, occurs twice, or is the number of another
    class.
    """
    with data_error(f"{path}: cannot be read as class names", "write one per line, in UTF-8", (OSError, ValueError)):
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().split("\n")]
    first: dict[str, int] = {}
    for line, name in enumerate(names, start=1):
        if not name or name in first:
            fault = f"{name!r} is in line {first[name]} too" if name else "is empty"
            raise DataError(f"{path}: line {line}: {fault}; write every class name once, one per line")
        if name.isdecimal() and int(name) != line - 1:
            raise DataError(f"{path}: line {line}: names class {line - 1} {name!r}, the number of another; rename it")
        first[name] = line
    return names


def content_hash(shards: Iterable[tuple[ShardRecord, Background]]) -> str:
    """A sha256 that identifies the samples and their order.

    It covers name, samples, bytes and (if known) sha256 of each shard, and its background unless that is white.
    """
    identity = [
        [
            shard.name,
            shard.samples,
            shard.bytes,
            shard.sha256 or None,
            *([] if background == WHITE else [str(background)]),
        ]
        for shard, background in shards
    ]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()
