"""Compares shards with their manifest and decodes every image. `ShardSet.open` has no time for that.

Images are read by offset, not in a pass (`passes`), because webdataset stops at damage and imports torch, which takes
seconds.
"""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from jitscale.data import tar_index
from jitscale.data.find import Tars
from jitscale.data.images import ImageError, decode
from jitscale.data.manifest import MANIFEST, Manifest, ShardRecord, label_key
from jitscale.data.tar_index import Defect, TarSample
from jitscale.errors import DataError
from jitscale.files import sha256_of
from jitscale.preparation.processes import in_processes
from jitscale.preparation.survey import by_place

_REBUILD = "rebuild it with tools/index_shards.py --force"


@dataclass(frozen=True)
class Verification:
    """The number of things checked, and the defects."""

    shards: int
    samples: int
    bytes: int
    seconds: float
    defects: list[Defect]  # sorted by shard and byte
    skipped: Counter[str]  # members that belong to no sample, by kind


def verify(tars: Tars, workers: int) -> Verification:
    """Compare the shards of `tars` with their manifest, and decode every image, in parallel.

    It checks size, sha256, number of samples, the index (against a fresh scan), the range of labels, and that every
    image can be decoded and has the manifest's resolution. If a shard is damaged, the others are still checked. If a
    tar is cut, the samples before the cut are checked. For a whole folder, every shard that the manifest names is
    checked. Raises a DataError if there is no manifest, or a process died.
    """
    manifest = tars.manifest
    if manifest is None:
        raise DataError(f"{tars.folder}: has no {MANIFEST} to compare with; make one with tools/index_shards.py")
    names = manifest.class_names
    defects: list[Defect] = []
    if names is not None and len(names) != manifest.num_classes:
        what = f"names {len(names)} classes and counts {manifest.num_classes}; write it again"
        defects.append(Defect(tars.folder / MANIFEST, None, what))
    if not tars.whole_folder:
        what = f"is not named by {MANIFEST}; choose another pattern or index the folder again"
        defects += [Defect(path, None, what) for path in tars.not_in_manifest()]
    records = [record for record in manifest.shards if tars.whole_folder or tars.folder / record.name in tars.paths]
    check = partial(_check, tars.folder, replace(manifest, shards=[], bad=[]))  # small enough for every task
    samples = read = 0
    skipped: Counter[str] = Counter()
    started = time.monotonic()
    with tqdm(total=sum(record.bytes for record in records), unit="B", unit_scale=True, desc="verify") as progress:
        for number, (of_shard, size, found, passed_over) in in_processes(check, records, workers, preload=[__name__]):
            samples += of_shard
            read += size
            defects += found
            skipped += passed_over
            progress.set_postfix_str(f"{samples / (time.monotonic() - started):.0f} img/s", refresh=False)
            progress.update(records[number].bytes)
    return Verification(len(records), samples, read, time.monotonic() - started, by_place(defects), skipped)


def _check(folder: Path, manifest: Manifest, record: ShardRecord) -> tuple[int, int, list[Defect], Counter[str]]:
    """Samples, bytes, defects, and members of no sample, of one shard; in any process."""
    path = folder / record.name
    if not path.is_file():
        return 0, 0, [Defect(path, None, "is missing; copy it again")], Counter()
    defects: list[Defect] = []
    samples = size = 0
    skipped: Counter[str] = Counter()
    remedy = "copy the shard again"
    try:
        size = path.stat().st_size
        if size != record.bytes:
            defects.append(Defect(path, None, f"has {size} bytes, the manifest says {record.bytes}; copy it again"))
        elif (digest := sha256_of(path)) != record.sha256:
            what = f"has sha256 {digest[:16]}..., the manifest says {record.sha256[:16]}...; copy it again"
            defects.append(Defect(path, None, what))
        else:
            remedy = "write the shard again without it, or keep it: training replaces it"
        scan = tar_index.survey_tar(path, label_key(manifest))
        samples, skipped = len(scan.samples), scan.skipped
        labels, wrong_labels = _labels(path, manifest, scan.samples)
        defects += scan.defects + list(wrong_labels.values())
        if scan.complete:
            if samples != record.samples:
                what = f"holds {samples} samples, the manifest says {record.samples}; write the manifest again"
                defects.append(Defect(path, None, what))
            defects += _index_defects(path, tar_index.index_of(scan.samples, labels), list(wrong_labels))
            defects += _key_defects(path, scan.samples)
        defects += _image_defects(path, manifest.resolution, scan.samples, remedy)
    except OSError as error:
        defects.append(Defect(path, None, f"cannot be read ({error}); repair its storage"))
    return samples, size, defects, skipped


def _labels(path: Path, manifest: Manifest, samples: list[TarSample]) -> tuple[list[int], dict[int, Defect]]:
    """The labels that the index should hold, and the defects of samples with a wrong label."""
    classes = manifest.num_classes
    numbers = {name: number for number, name in enumerate(manifest.class_names or [])}
    labels: list[int] = []
    wrong: dict[int, Defect] = {}
    for row, sample in enumerate(samples):
        label = None if sample.label is None else tar_index.class_number(sample.label, numbers)
        if classes and (label is None or label >= classes):
            found = "no label" if sample.label is None else f"label {sample.label!r}"
            what = f"sample {row} has {found}, needs one in 0..{classes - 1}; write the shard again"
            wrong[row] = Defect(path, sample.offset, what)
        labels.append(tar_index.NO_LABEL if label is None else label)
    return labels, wrong


def _index_defects(path: Path, fresh: tar_index.IndexArray, wrong_labels: list[int]) -> list[Defect]:
    """The index's differences from the headers of the tar, except in `wrong_labels`, which are defects already."""
    beside = tar_index.index_path(path)
    if not beside.exists():
        return [Defect(path, None, f"has no index next to it; {_REBUILD}")]
    try:
        index = tar_index.map_index(beside)
    except DataError as error:
        return [Defect(path, None, f"has an index that {str(error).removeprefix(f'{beside}: ')}")]
    if len(index) != len(fresh):
        return [Defect(path, None, f"holds {len(fresh)} samples, {beside.name} lists {len(index)}; {_REBUILD}")]
    differs = index != fresh
    differs[np.array(wrong_labels, np.int64)] = False
    if not differs.any():
        return []
    first = int(differs.argmax())
    what = f"{beside.name} differs in {differs.sum()} of {len(fresh)} samples: of sample {first} it says "
    what += f"{_entry(index[first].item())}, the tar {_entry(fresh[first].item())}; {_REBUILD}"
    return [Defect(path, int(fresh["offset"][first]), what)]


def _key_defects(path: Path, samples: list[TarSample]) -> list[Defect]:
    """Compare the file of keys next to the tar with the tar's headers. A shard may have no such file."""
    beside = tar_index.keys_path(path)
    if not beside.exists():
        return []
    try:
        keys = tar_index.parse_keys(beside.read_bytes(), str(beside), len(samples))
    except DataError as error:
        return [Defect(path, None, f"has keys next to it: {str(error).removeprefix(f'{beside}: ')}")]
    differs = keys != tar_index.key_hashes(samples)
    if not differs.any():
        return []
    first = int(differs.argmax())
    what = f"{beside.name} differs in {differs.sum()} of {len(samples)} samples, first in {first}; {_REBUILD}"
    return [Defect(path, samples[first].offset, what)]


def _entry(record: tuple[int, int, int, bytes]) -> str:
    offset, size, label, extension = record
    return f"{size} bytes of {extension.decode(errors='replace')} at {offset}, label {label}"


def _image_defects(path: Path, resolution: int | None, samples: list[TarSample], remedy: str) -> Iterator[Defect]:
    file = tar_index.OffsetReader(path)
    for row, sample in enumerate(samples):
        try:
            height, width = decode(file.read(sample.offset, sample.size), sample.extension).shape[:2]
        except ImageError as error:
            yield Defect(path, sample.offset, f"sample {row} {error}; {remedy}")
            continue
        except MemoryError as error:
            what = f"byte {sample.offset}: sample {row} needs more memory than there is"
            raise DataError(f"{path}: {what}; use fewer --workers") from error
        if resolution not in (None, width) or resolution not in (None, height):
            what = f"is {width} x {height} pixels, but the manifest says {resolution} per side"
            yield Defect(path, sample.offset, f"sample {row} {what}; write the shard or the manifest again")
