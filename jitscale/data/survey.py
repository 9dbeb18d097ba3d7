"""Makes the tars of another program into shards: scans them in parallel, numbers their labels, and writes an index
beside every tar and a manifest. The tars themselves are only read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from jitscale.data.find import Tars
from jitscale.data.images import ImageError, dimensions
from jitscale.data.labels import REFUSED, CodedLabels, find_classes, label_code, parse_label
from jitscale.data.manifest import MANIFEST, Manifest, ShardRecord
from jitscale.data.processes import in_processes
from jitscale.data.tar_index import (
    LARGEST_LABEL,
    Defect,
    IndexArray,
    OffsetReader,
    TarSample,
    count_classes,
    index_of,
    key_hashes,
    survey_tar,
    write_index,
    write_keys,
)
from jitscale.errors import DataError
from jitscale.files import remove_durably, sha256_of
from jitscale.keyed_random import UInt64Array

FOREIGN = "foreign"  # the codec of shards that another program wrote

_HEAD = 1 << 16  # bytes of an image that nearly always hold its header


@dataclass(frozen=True)
class ShardScan:
    """What one pass over a tar found."""

    path: Path
    bytes: int
    sha256: str  # empty: not asked for, or the tar is damaged
    index: IndexArray  # labels are codes, see `CodedLabels`
    names: list[str]
    keys: UInt64Array  # hashes of the samples' keys
    image_sizes: set[tuple[int, int]]  # width and height
    undecodable: int  # images without a readable header
    defects: list[Defect]


@dataclass(frozen=True)
class Labels:
    """The labels of all shards as numbers."""

    indices: list[IndexArray]  # one a shard
    class_names: list[str] | None
    num_classes: int
    defects: list[Defect]


@dataclass(frozen=True)
class Survey:
    """What makes a folder's tars into shards; nothing of it is on disk yet."""

    tars: Tars
    manifest: Manifest
    indices: list[IndexArray]  # one a tar
    keys: list[UInt64Array]  # one a tar
    undecodable: int
    defects: list[Defect]  # sorted; with any, the rest does not describe the tars

    def write(self) -> None:
        """Write the index and the keys of every tar, and the manifest last.

        Raises:
            DataError: the folder cannot be written to.
        """
        assert not self.defects
        manifest = self.tars.folder / MANIFEST
        try:
            if self.tars.manifest is not None and self.tars.manifest != self.manifest:
                remove_durably(manifest)  # labels under it may mean something else than those of the new indexes
            for path, index, keys in zip(self.tars.paths, self.indices, self.keys, strict=True):
                write_keys(path, keys)
                write_index(path, index)
            self.manifest.write(manifest)
        except OSError as error:
            raise DataError(f"{self.tars.folder}: cannot be written to ({error}); make room or correct it") from error


def scan_shards(paths: Sequence[Path], workers: int, *, content: bool = True) -> list[ShardScan]:
    """One scan of every tar, in the order of `paths`, in parallel and with a progress bar.

    Args:
        paths: of the tars.
        workers: processes at most.
        content: also read the content: sha256 and the sizes of the images.

    Raises:
        DataError: a process died. Mistakes in a tar are among its defects.
    """
    scans: dict[int, ShardScan] = {}
    sizes = [path.stat().st_size if path.is_file() else 0 for path in paths]
    with tqdm(total=sum(sizes), unit="B", unit_scale=True, desc="scan") as progress:
        for number, scan in in_processes(partial(_scan, content=content), paths, workers, preload=[__name__]):
            scans[number] = scan
            progress.update(sizes[number])
    return [scans[number] for number in range(len(paths))]


def number_labels(scans: Sequence[ShardScan], class_names: list[str] | None) -> Labels:
    """Give every sample of `scans` the number of its class, see `find_classes`; a label of another kind is a defect."""
    coded = [CodedLabels(scan.index["label"], scan.names) for scan in scans]
    classes = find_classes(coded, class_names)
    indices, defects = [], []
    for scan, labels in zip(scans, coded, strict=True):
        index = scan.index.copy()
        index["label"] = labels.numbers(classes)
        indices.append(index)
        for row, what, remedy in labels.wrong(classes):
            defects.append(Defect(scan.path, int(scan.index["offset"][row]), f"sample {row} {what}; {remedy}"))
    return Labels(indices, classes.names, classes.number, defects)


def survey(tars: Tars, class_names: list[str] | None, workers: int) -> Survey:
    """Scan `tars` for what makes them shards; nothing is written.

    The manifest of a packing stays as it is, since it holds facts that no scan can find; the tars must match it.

    Args:
        tars: from `find_tars`.
        class_names: in the order of their numbers; None where labels are numbers, or to sort the names.
        workers: processes at most.

    Raises:
        DataError: no sample at all; class names for a packing; a process died. Mistakes in tars and labels are among
            the defects.
    """
    packed = None if tars.manifest is None or tars.manifest.codec == FOREIGN else tars.manifest
    if packed is not None:
        if class_names is not None:
            raise DataError(
                f"{tars.folder / MANIFEST}: came from packing, which named the classes; leave out --class-names"
            )
        tars = replace(tars, paths=[tars.folder / record.name for record in packed.shards])
        class_names = packed.class_names
    scans = scan_shards(tars.paths, workers)
    labels = number_labels(scans, class_names)
    defects = [defect for scan in scans for defect in scan.defects] + labels.defects
    records = [ShardRecord(scan.path.name, len(scan.index), scan.bytes, scan.sha256) for scan in scans]
    total = sum(record.samples for record in records)
    if packed is not None:
        manifest = packed
        differing = [number for number, record in enumerate(records) if record != packed.shards[number]]
        what = "is not the shard that the manifest names; copy it again"
        defects += [Defect(tars.paths[number], None, what) for number in differing if not scans[number].defects]
    else:
        sizes = set().union(*(scan.image_sizes for scan in scans))
        width, height = sizes.pop() if len(sizes) == 1 else (0, 1)
        resolution = width if width == height else None
        counts = count_classes(labels.indices, labels.num_classes)
        manifest = Manifest(
            FOREIGN, resolution, labels.num_classes, labels.class_names, total, records, class_counts=counts
        )
    if not total and not defects:
        raise DataError(f"{tars.folder}: {len(tars.paths)} tars without a single sample; choose another folder")
    return Survey(
        tars,
        manifest,
        labels.indices,
        keys=[scan.keys for scan in scans],
        undecodable=sum(scan.undecodable for scan in scans),
        defects=by_place(defects),
    )


def by_place(defects: Iterable[Defect]) -> list[Defect]:
    """`defects` sorted by shard and byte."""
    return sorted(defects, key=lambda defect: (defect.path, -1 if defect.byte is None else defect.byte))


def _scan(path: Path, *, content: bool) -> ShardScan:
    """One shard, in any process; mistakes in it are defects."""
    tar = survey_tar(path)
    defects = list(tar.defects)
    labels: list[int] = []
    names: dict[str, int] = {}
    for row, sample in enumerate(tar.samples):
        label = parse_label(sample.label)
        wrong = ""
        if label is None and sample.label is not None:
            wrong = f"a number outside 0..{LARGEST_LABEL}" if sample.label else "nothing"
        elif isinstance(label, str) and ("\ufffd" in label or not label.isprintable()):
            wrong = "not printable UTF-8"
        if wrong:
            what = f"sample {row} has label {sample.label!r}, {wrong}; write the class number or name"
            defects.append(Defect(path, sample.offset, what))
        labels.append(REFUSED if wrong else label_code(label, names))
    sha256, size, undecodable = "", 0, 0
    image_sizes: set[tuple[int, int]] = set()
    try:
        size = path.stat().st_size
        if content and tar.complete:
            sha256 = sha256_of(path)
            image_sizes, undecodable = _image_sizes(path, tar.samples)
    except OSError as error:
        if tar.complete:  # otherwise the scan has listed a defect already
            defects.append(Defect(path, None, f"cannot be read ({error}); mend its storage"))
    index, keys = index_of(tar.samples, labels), key_hashes(tar.samples)
    return ShardScan(path, size, sha256, index, list(names), keys, image_sizes, undecodable, defects)


def _image_sizes(path: Path, samples: list[TarSample]) -> tuple[set[tuple[int, int]], int]:
    """The sizes that images have, and how many images have no readable header."""
    sizes: set[tuple[int, int]] = set()
    undecodable = 0
    file = OffsetReader(path)
    for sample in samples:
        try:
            sizes.add(_image_size(file, sample))
        except ImageError:
            undecodable += 1
    return sizes, undecodable


def _image_size(file: OffsetReader, sample: TarSample) -> tuple[int, int]:
    head = file.read(sample.offset, min(sample.size, _HEAD))
    try:
        return dimensions(head, sample.extension)
    except ImageError:
        if len(head) == sample.size:
            raise
        return dimensions(file.read(sample.offset, sample.size), sample.extension)
