"""Makes the tars of another program into shards: scans them in parallel, numbers their labels, and writes an index
next to every tar and a manifest. The tars themselves are only read.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from jitscale.data import tar_index
from jitscale.data.background import Background
from jitscale.data.find import Tars
from jitscale.data.images import ImageError, dimensions
from jitscale.data.manifest import MANIFEST, Manifest, ShardRecord
from jitscale.data.tar_index import Defect
from jitscale.data.tar_labels import CLS, LabelKey
from jitscale.data.tar_members import holds_labels
from jitscale.errors import DataError, data_error
from jitscale.files import remove_durably, sha256_of
from jitscale.keyed_random import UInt64Array
from jitscale.preparation.forms.layouts import splits_of_files
from jitscale.preparation.forms.listing import beginning_of
from jitscale.preparation.labels import REFUSED, Classes, CodedLabels, find_classes, label_code, parse_label
from jitscale.preparation.processes import in_processes
from jitscale.preparation.webdataset_info import counts_of, wrong_count

FOREIGN = "foreign"  # the codec of shards that another program wrote

_HEAD = 1 << 16  # bytes of an image that nearly always hold its header


@dataclass(frozen=True)
class ShardScan:
    """The result of one pass over a tar."""

    path: Path
    record: ShardRecord  # without a sha256 if the content was not requested, or the tar is damaged
    index: tar_index.IndexArray
    names: list[str]  # class names by the label codes of the index, see `CodedLabels`
    keys: UInt64Array  # hashes of the samples' keys
    image_sizes: set[tuple[int, int]]  # width and height
    undecodable: int  # images without a readable header
    defects: list[Defect]
    skipped: Counter[str]  # members that belong to no sample, by kind


@dataclass(frozen=True)
class Survey:
    """Everything that makes the tars of a folder into shards. Nothing of it is on disk yet."""

    tars: Tars
    manifest: Manifest
    scans: list[ShardScan]  # one per tar
    defects: list[Defect]  # sorted; if there is any, the other fields do not describe the tars

    @property
    def skipped(self) -> Counter[str]:
        """Members of all tars that belong to no sample, by kind."""
        return sum((scan.skipped for scan in self.scans), Counter())

    def write(self) -> None:
        """Write the index and the keys of every tar, and the manifest last. Raises a DataError if that fails."""
        assert not self.defects
        manifest = self.tars.folder / MANIFEST
        with data_error(f"{self.tars.folder}: cannot be written to", "make room or correct it"):
            if self.tars.manifest is not None and self.tars.manifest != self.manifest:
                remove_durably(manifest)  # its class numbers may differ from those of the new indexes
            for scan in self.scans:
                tar_index.save_array(tar_index.keys_path(scan.path), scan.keys)
                tar_index.save_array(tar_index.index_path(scan.path), scan.index)
            self.manifest.write(manifest)


def scan_shards(
    paths: Sequence[Path],
    class_names: list[str] | None,
    workers: int,
    *,
    content: bool = True,
    key: LabelKey = CLS,
) -> tuple[list[ShardScan], Classes, list[Defect]]:
    """Scan tars in parallel with a progress bar, and give every sample the number of its class, see `find_classes`.

    Returns the scans in the order of `paths`, the classes, and the defects of tars and labels. With `content`, sha256
    and the sizes of the images are read too. `key` says where the labels are. Raises a DataError if a process died.
    """
    found: dict[int, ShardScan] = {}
    scan_one = partial(_scan, content=content, key=key)
    sizes = [path.stat().st_size if path.is_file() else 0 for path in paths]
    with tqdm(total=sum(sizes), unit="B", unit_scale=True, desc="scan", disable=not paths) as progress:
        for number, found[number] in in_processes(scan_one, paths, workers, preload=[__name__]):
            progress.update(sizes[number])
    scans = [found[number] for number in range(len(paths))]
    coded = [CodedLabels(scan.index["label"].copy(), scan.names) for scan in scans]
    classes = find_classes(coded, class_names)
    defects = [defect for scan in scans for defect in scan.defects]
    for scan, labels in zip(scans, coded, strict=True):
        scan.index["label"] = labels.numbers(classes)
        for row, what, remedy in labels.wrong(classes):
            defects.append(Defect(scan.path, int(scan.index["offset"][row]), f"sample {row} {what}; {remedy}"))
    return scans, classes, defects


def survey(
    tars: Tars,
    class_names: list[str] | None,
    workers: int,
    *,
    key: LabelKey = CLS,
    background: Background | None = None,
) -> Survey:
    """Scan `tars` for everything that makes them shards. Nothing is written. Mistakes in tars and labels are defects.

    A manifest of tools/make_shards.py stays as it is, because it holds facts that no scan can find; the tars must match
    it. `class_names` are in the order of their numbers; None if labels are numbers, or to sort the names. `key` says
    where the labels are. `background` is that of transparent images; None: that of the existing manifest, else white.
    Raises a DataError if there is no sample at all, if class names, a key or a background are given for packed shards,
    if the tars belong to several splits, or if a process died.
    """
    packed = None if tars.manifest is None or tars.manifest.codec == FOREIGN else tars.manifest
    if packed is not None:
        for given, option, fact in (
            (class_names, "--class-names", "named the classes"),
            (background, "--background", "chose the background"),
            (key if key != CLS else None, "--label-key", "wrote cls"),
        ):
            if given is not None:
                raise DataError(f"{tars.folder / MANIFEST}: came from packing, which {fact}; leave out {option}")
        tars = replace(tars, paths=[tars.folder / record.name for record in packed.shards])
        class_names = packed.class_names
    elif tars.whole_folder:
        splits = splits_of_files([path.name for path in tars.paths])
        if len(splits) > 1:
            what = f"holds the tars of several splits ({' and '.join(sorted(splits.values()))})"
            raise DataError(f"{tars.folder}: {what}; give those of one, for example '{tars.folder}/*train*.tar'")
    scans, classes, defects = scan_shards(tars.paths, class_names, workers, key=key)
    if packed is not None:
        for scan, record in zip(scans, packed.shards, strict=True):
            if scan.record != record and not scan.defects:
                defects.append(Defect(scan.path, None, "is not the shard that the manifest names; copy it again"))
        return Survey(tars, packed, scans, by_place(defects))
    if not classes.number and key == CLS and tars.whole_folder:
        _refuse_labels_beside(tars.folder)
    records = [scan.record for scan in scans]
    known = counts_of(tars.folder, {path.name for path in tars.paths}, whole=tars.whole_folder)
    for scan in scans:
        if wrong := wrong_count(known, scan.path.name, scan.record.samples):
            defects.append(Defect(scan.path, None, wrong))
    total = sum(record.samples for record in records)
    if not total and not defects:
        raise DataError(f"{tars.folder}: {len(tars.paths)} tars without a single sample; choose another folder")
    sizes = set().union(*(scan.image_sizes for scan in scans))
    width, height = sizes.pop() if len(sizes) == 1 else (0, 1)
    resolution = width if width == height else None
    counts = tar_index.count_classes((scan.index for scan in scans), classes.number)
    manifest = Manifest(FOREIGN, resolution, classes.number, classes.names, total, records, class_counts=counts)
    if tars.manifest is not None:
        manifest = replace(manifest, background=tars.manifest.background)
    if background is not None:
        manifest = replace(manifest, background=str(background))
    manifest = replace(manifest, label_key=str(key))
    return Survey(tars, manifest, scans, by_place(defects))


def _refuse_labels_beside(folder: Path) -> None:
    """Raise a DataError if a file in `folder`, whose tars hold no labels, seems to hold them."""
    stems = {path.stem for path in folder.glob("*.tar")}
    for path in sorted(folder.iterdir()):
        describes_tar = path.stem.removesuffix("_stats") in stems  # as files of img2dataset do
        if describes_tar or path.name.startswith(".") or not path.is_file():
            continue
        if holds_labels(path.name, partial(beginning_of, str(path))):
            what = "seems to hold labels, and the tars next to it have no cls members"
            remedy = "write each label as a member KEY.cls, or pass --label-key none for no labels"
            raise DataError(f"{path}: {what}; {remedy}")


def by_place(defects: Iterable[Defect]) -> list[Defect]:
    """`defects` sorted by shard and byte."""
    return sorted(defects, key=lambda defect: (defect.path, -1 if defect.byte is None else defect.byte))


def _scan(path: Path, *, content: bool, key: LabelKey) -> ShardScan:
    """Scan one shard, in any process. Mistakes in it are defects."""
    tar = tar_index.survey_tar(path, key)
    defects = list(tar.defects)
    if tar.unread_labels:
        defects.append(Defect(path, None, tar.unread_labels))
    codes: list[int] = []
    names: dict[str, int] = {}
    for row, sample in enumerate(tar.samples):
        label = parse_label(sample.label)
        wrong = ""
        if label is None and sample.label is not None:
            wrong = f"a number outside 0..{tar_index.LARGEST_LABEL}" if sample.label else "nothing"
        elif isinstance(label, str) and ("\ufffd" in label or not label.isprintable()):
            wrong = "not printable UTF-8"
        if wrong:
            what = f"sample {row} has label {sample.label!r}, {wrong}; write the class number or name"
            defects.append(Defect(path, sample.offset, what))
        codes.append(REFUSED if wrong else label_code(label, names))
    sha256, size, undecodable = "", 0, 0
    image_sizes: set[tuple[int, int]] = set()
    try:
        size = path.stat().st_size
        if content and tar.complete:
            sha256, file = sha256_of(path), tar_index.OffsetReader(path)
            for sample in tar.samples:
                try:
                    image_sizes.add(_image_size(file, sample))
                except ImageError:
                    undecodable += 1
    except OSError as error:
        if tar.complete:  # otherwise the scan has listed a defect already
            defects.append(Defect(path, None, f"cannot be read ({error}); repair its storage"))
    record = ShardRecord(path.name, len(tar.samples), size, sha256)
    index, keys = tar_index.index_of(tar.samples, codes), tar_index.key_hashes(tar.samples)
    return ShardScan(path, record, index, list(names), keys, image_sizes, undecodable, defects, tar.skipped)


def _image_size(file: tar_index.OffsetReader, sample: tar_index.TarSample) -> tuple[int, int]:
    """Width and height by the header of the image, which usually lies in its first bytes."""
    head = file.read(sample.offset, min(sample.size, _HEAD))
    try:
        return dimensions(head, sample.extension)
    except ImageError:
        if len(head) == sample.size:
            raise
        return dimensions(file.read(sample.offset, sample.size), sample.extension)
