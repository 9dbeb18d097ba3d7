"""A packing job: any number of processes write the shards of one input. Any of them may die at any time.

    DIR/shard-000000.tar, .index.npy, .keys.npy   as `packing` writes them
    DIR/manifest.json                      written last
    DIR/packing.json, .packing/plan.json   see `packing_plan`
    DIR/.packing/shard-000000.json         commit record: this shard is complete; lists the inputs left out of it

A shard depends only on the plan and its number, so every process writes the same bytes.
"""

import json
import os
import shutil
import time
import warnings
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import numpy as np

from jitscale.data.background import parse_background
from jitscale.data.manifest import MANIFEST, BadInput, Manifest, ShardRecord
from jitscale.data.tar_index import count_classes, index_path, map_index
from jitscale.errors import DataError, UserError, data_error
from jitscale.files import aside_pattern
from jitscale.keyed_random import Int64Array
from jitscale.preparation import packing
from jitscale.preparation.finding import OnFound
from jitscale.preparation.packing import ORIGINAL, PackedShard, ShardTask, shard_name, shard_number
from jitscale.preparation.packing_plan import (
    DAMAGED_JSON,
    FOLDER,
    PackingOptions,
    make_plan,
    read_plan,
    refuse_options_unlike_kept,
    refuse_other_options,
    write_json,
    write_options,
)
from jitscale.preparation.processes import WorkerDiedError, in_processes
from jitscale.preparation.sources import Storage, located

_REFRESH_SECONDS = 30.0  # between two looks for shards that other tasks have finished
_TAR_BLOCK, _TAR_RECORD = 512, 10_240  # bytes; a tar's size is a multiple of the record
_NPY_HEADER = 128  # bytes
_SIZES_LOOKED_AT = 1000  # files whose sizes are looked up for the estimate
_FEW = 3  # bad inputs in an error message


class PackingJob:
    """The shards of one folder: those to write, and those written already."""

    def __init__(
        self, folder: Path, options: PackingOptions, most_bad: int | None = None, on_found: OnFound = lambda count: None
    ) -> None:
        """Plan the job, or join it if it was planned before. For `on_found` see `find_sources`.

        At most `most_bad` inputs may be bad, over the shards of all tasks. Raises a DataError if the input makes no
        sense, the folder cannot be used, or the job was begun with other options.
        """
        if not (folder / FOLDER).exists():
            make_plan(folder, options, on_found)
        plan, self.inputs = read_plan(folder)
        refuse_other_options(folder, options, plan["options"])
        self.folder = folder
        self.options = options
        self.shards = range(-(-len(self.inputs) // options.samples_per_shard))  # the numbers of all shards
        self._most_bad = default_most_bad(len(self.inputs)) if most_bad is None else most_bad
        self._root: str = plan["root"]
        self._order = self.inputs.order(options.seed)
        self._packed: dict[int, PackedShard] = {}
        self._bad: list[BadInput] = []  # inputs left out of the shards written so far
        self._refresh()

    def missing(self, shards: Sequence[int]) -> list[int]:
        """The numbers in `shards` that are not written, as far as this task knows."""
        return [shard for shard in shards if shard not in self._packed]

    def images_of(self, shards: Sequence[int]) -> int:
        """The number of inputs that belong to `shards`."""
        return sum(len(self._slice(shard)) for shard in shards)

    def run(self, shards: Sequence[int], workers: int) -> Generator[PackedShard, None, None]:
        """Write the missing ones of `shards` in `workers` processes, and yield each when it is finished.

        Raises a DataError if too many inputs are bad, or a shard cannot be written, and a UserError if a worker died.
        Finished shards stay.
        """
        self._check_bad()
        tasks = map(self._task, self.missing(shards))
        refreshed = time.monotonic()
        try:
            with closing(in_processes(_pack, tasks, workers, preload=["webdataset"])) as results:
                for _, packed in results:
                    self._note(packed)
                    yield packed
                    if time.monotonic() - refreshed > _REFRESH_SECONDS:
                        self._refresh()
                        refreshed = time.monotonic()
                    self._check_bad()
        except packing.TooManyBadError as error:
            self._check_bad(error.bad)
            raise  # never reached: a shard is abandoned only beyond the limit
        except WorkerDiedError as error:
            left = next(self.folder.glob(f".shard-*.{error.pid}.partial"), None)  # see `atomic_write`
            shard = "nothing yet" if left is None else shard_name(shard_number(left.name[1:].partition(".")[0]))
            remedy = f"the same command continues; maybe use fewer --workers than {workers}"
            raise UserError(f"{error.what} while it wrote {shard}; all finished shards stay, and {remedy}") from error

    def finish(self) -> Manifest | None:
        """Write the manifest if all shards are there. Returns None if other tasks still have to write some.

        Several tasks may call this at once. Raises a DataError if too many inputs are bad, or all are.
        """
        self._refresh()
        self._check_bad()
        if self.missing(self.shards):
            return None
        packed = [self._packed[shard] for shard in self.shards]
        indexes = (map_index(index_path(self.folder / one.record.name)) for one in packed)
        bad = sorted(self._bad, key=lambda one: (one.source, one.reason))
        original = self.options.codec == ORIGINAL
        manifest = Manifest(
            codec=self.options.codec,
            resolution=None if original else self.options.resolution,
            num_classes=self.inputs.num_classes,
            class_names=self.inputs.class_names,
            total=sum(one.record.samples for one in packed),
            shards=[one.record for one in packed],
            crop=None if original else "adm",
            enlarged=sum(one.enlarged for one in packed),
            bad=bad,
            class_counts=count_classes(indexes, self.inputs.num_classes),
            background=self.options.background,
            transparent=sum(one.transparent for one in packed),
            channels=self.options.channels,
        )
        if manifest.total == 0:
            raise DataError(f"{self.folder}: none of the {len(bad)} images can be used ({_few(bad)}); correct --input")
        write_options(self.folder, self.options, self._root)
        manifest.write(self.folder / MANIFEST)
        remove_leftovers(self.folder)
        return manifest

    def bytes_to_write(self) -> int:
        """Bytes that the missing tars will take: exact for raw if no input is bad, else an estimate."""
        cropped = _NPY_HEADER + self.options.channels * self.options.resolution**2
        image = self._mean_size() if self.options.codec == ORIGINAL else cropped
        sample = _TAR_BLOCK + _padded(image, _TAR_BLOCK)
        if self.inputs.num_classes:
            sample += 2 * _TAR_BLOCK
        tars = (len(self._slice(shard)) * sample + 2 * _TAR_BLOCK for shard in self.missing(self.shards))
        return sum(_padded(tar, _TAR_RECORD) for tar in tars)

    def _refresh(self) -> None:
        """Look for shards that this and other tasks have written."""
        for path in (self.folder / FOLDER).iterdir():
            if path.match("shard-*.json") and shard_number(path.name) not in self._packed:
                packed = _read_record(path)
                if packed is not None and _is_there(self.folder, packed.record):
                    self._note(packed)

    def _note(self, packed: PackedShard) -> None:
        if (shard := shard_number(packed.record.name)) not in self._packed:
            self._packed[shard] = packed
            self._bad += packed.bad

    def _mean_size(self) -> int:
        """Bytes of an input, from a sample of them."""
        sizes = []
        for number in np.linspace(0, len(self.inputs) - 1, min(_SIZES_LOOKED_AT, len(self.inputs)), dtype=np.int64):
            source = self.inputs[int(number)]
            try:
                path = located(source.path, self._root)
                sizes.append(os.stat(path).st_size if source.storage == Storage.FILE else source.size)
            except (OSError, ValueError):  # packing will list it as a bad input
                continue
        return int(np.mean(sizes)) if sizes else 0

    def _task(self, shard: int) -> ShardTask:
        sources = {number: self.inputs[number] for number in self._slice(shard).tolist()}
        path, options = self.folder / shard_name(shard), self.options
        return ShardTask(
            path,
            self._root,
            sources,
            options.codec,
            options.resolution,
            self._most_bad - len(self._bad),
            parse_background(options.background),
            options.channels,
            options.finding.image_column,
        )

    def _slice(self, shard: int) -> Int64Array:
        size = self.options.samples_per_shard
        return self._order[shard * size : (shard + 1) * size]

    def _check_bad(self, more: Sequence[BadInput] = ()) -> None:
        """Refuse too many bad inputs; `more` are those of a shard that was abandoned."""
        bad = [*self._bad, *more]
        if len(bad) > self._most_bad:
            raise DataError(
                f"{self.folder}: {len(bad)} of {len(self.inputs)} images cannot be used, the limit is {self._most_bad} "
                f"({_few(bad)}); finished shards stay: correct --input, or continue with --max-bad {len(bad)} or more"
            )


def default_most_bad(images: int) -> int:
    """The default limit of bad images among so many `images`: the same share as in training."""
    return max(10, images // 10_000)


def finished(folder: Path, options: PackingOptions) -> Manifest | None:
    """The manifest of a finished job; None if the job is not finished.

    Raises a DataError if the shards were written with other options, or are damaged.
    """
    if not (folder / MANIFEST).exists():
        return None
    manifest = Manifest.read(folder / MANIFEST)
    images, shards = manifest.total + len(manifest.bad), len(manifest.shards)
    there = {
        "--codec": (manifest.codec, options.codec),
        "--resolution": (manifest.resolution, None if options.codec == ORIGINAL else options.resolution),
        "--background": (manifest.background, options.background),
        "--channels": (manifest.channels, options.channels),
        "--samples-per-shard": (shards, -(-images // options.samples_per_shard)),
        "--class-names": (manifest.class_names, options.finding.class_names or manifest.class_names),
    }
    other = [name for name, (found, wanted) in there.items() if found != wanted]
    if other:
        raise DataError(
            f"{folder}: holds {shards} finished shards with another {' and '.join(other)} (codec {manifest.codec}, "
            f"resolution {manifest.resolution}, {images} images); remove the folder or choose another --output"
        )
    refuse_options_unlike_kept(folder, options)
    lost = [record.name for record in manifest.shards if not _is_there(folder, record)]
    if lost:
        what = f"missing, without its index, or of another size ({len(lost)} of {shards} finished shards are)"
        raise DataError(f"{folder / lost[0]}: {what}; restore them, or remove the folder and pack again")
    return manifest


def remove_leftovers(folder: Path) -> None:
    """Remove files that a finished job no longer needs. Another task may do the same at the same time."""
    for pattern in (f"{FOLDER}.*.partial", FOLDER):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
    for name in ("shard-*", MANIFEST):
        for path in folder.glob(aside_pattern(name)):
            path.unlink(missing_ok=True)


# Commit records, and the shards that they describe


def _pack(task: ShardTask) -> PackedShard:
    """Write one shard and its commit record, in any process. Raises as `pack_shard` does, with remedies."""
    warnings.filterwarnings("ignore", module="PIL")  # it warns of large or unusual images, which are used nevertheless
    remedy = "all finished shards stay: make room or repair the storage, and give the same command again"
    try:
        with data_error(f"{task.path}: cannot be written", remedy):
            packed = packing.pack_shard(task)
            write_json(task.path.parent / FOLDER / f"{task.path.stem}.json", asdict(packed))
            return packed
    except MemoryError as error:
        raise DataError(f"{task.path}: too little memory; give the same command with fewer --workers") from error


def _read_record(path: Path) -> PackedShard | None:
    """The record in the file `path`; None if it is damaged: its shard is then written again."""
    try:
        values = json.loads(path.read_bytes())
        bad = [BadInput(**one) for one in values["bad"]]
        counts = {name: int(values[name]) for name in ("enlarged", "transparent")}
        return PackedShard(ShardRecord(**values["record"]), bad=bad, **counts)
    except DAMAGED_JSON:
        return None


def _is_there(folder: Path, record: ShardRecord) -> bool:
    tar = folder / record.name
    return tar.exists() and tar.stat().st_size == record.bytes and index_path(tar).exists()


def _padded(size: int, unit: int) -> int:
    """The multiple of `unit` that is at least `size`."""
    return -(-size // unit) * unit


def _few(bad: list[BadInput]) -> str:
    first = sorted(bad, key=lambda one: (one.source, one.reason))[:_FEW]
    return "; ".join(f"{one.source} {one.reason}" for one in first)
