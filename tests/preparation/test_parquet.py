"""Parquet files as the Hugging Face hub stores images, and as other programs write them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from jitscale.data.manifest import Manifest
from jitscale.data.tar_index import LARGEST_LABEL, NO_LABEL
from jitscale.preparation.reading import SourceReader
from jitscale.preparation.sources import SourceTable, Storage
from tests.preparation.packing_jobs import alone, command, finish, images_and_labels, refused_input, start
from tests.preparation.row_inputs import (
    NAMES,
    SIZE,
    data_set,
    found,
    labels_of,
    metadata,
    pictures,
    rows,
    stored,
    write,
)
from tests.support import ROOT
from tests.support.pictures import file_bytes

LABELS = [2, 0, 1, 0, 2, 1, 1]
CLASSES = {"_type": "ClassLabel", "names": NAMES}


def pack(source: Path, output: Path, *more: str) -> None:
    finished = alone(source, output, "--resolution", str(SIZE), *more)
    assert finished.code == 0, finished.err


def hub_repository(folder: Path) -> Path:
    """A repository with the layout of push_to_hub, written by `datasets`."""
    (folder / "data").mkdir(parents=True)
    for number in range(2):
        part = data_set(LABELS[4 * number : 4 * number + 4], 4 * number)
        part.to_parquet(folder / "data" / f"train-{number:05d}-of-00002.parquet")
    data_set([1, 1], 90).to_parquet(folder / "data" / "test-00000-of-00001-0123456789abcdef.parquet")
    (folder / "README.md").write_text("# A data set\n")
    return folder


def test_files_of_the_library_are_packed_by_worker_processes(tmp_path: Path) -> None:
    source = hub_repository(tmp_path / "hub")
    more = ["--resolution", str(SIZE), "--samples-per-shard", "3", "--split", "train"]
    code, out, err = finish(start(command(source, tmp_path / "out", *more)))
    assert (code, err) == (0, "")
    assert f"{source}: the split train of test, train" in out
    assert "7 images, 3 classes (0 zebra, 1 ant, 2 moth), 3 shards" in out
    images, labels = images_and_labels(tmp_path / "out")
    assert np.array_equal(images, pictures(7))
    assert labels == LABELS
    assert Manifest.read(tmp_path / "out" / "manifest.json").class_names == NAMES


def runs(table: SourceTable) -> list[int]:
    """The lengths of the runs of neighbouring rows in a random order, block by block."""
    rows = np.array([table[int(number)].offset for number in table.order(seed=1)])
    assert sorted(rows) == list(range(len(rows)))
    ends = np.flatnonzero(np.diff(rows, append=-2) != 1)
    return np.diff(ends, prepend=-1).tolist()


def test_rows_of_a_group_stay_neighbours(tmp_path: Path) -> None:
    table = found(write(rows(30, label=[0] * 30), tmp_path / "a.parquet", row_group_size=5))
    assert all(length % 5 == 0 for length in runs(table))
    assert len(runs(table)) > 3
    assert {table[0].storage, table[29].storage} == {Storage.PARQUET}
    assert table[7].place == f"{tmp_path}/a.parquet: row 7"


def test_a_large_row_group_of_small_images_is_cut_into_blocks(tmp_path: Path) -> None:
    images = [{"bytes": file_bytes(pictures(1)[0]), "path": None}] * 9500
    table = found(write(pa.table({"image": images, "label": [0] * 9500}), tmp_path / "a.parquet"))
    assert len(runs(table)) > 5
    assert all(length % 950 == 0 for length in runs(table))
    assert table.notes == []


def test_rows_are_read_in_any_order(tmp_path: Path) -> None:
    table = found(write(rows(300, label=[0] * 300), tmp_path / "a.parquet", row_group_size=140))
    contents = [file_bytes(image) for image in pictures(300)]
    assert stored(table) == contents
    reader = SourceReader("/")
    for number in np.random.default_rng(0).permutation(300):
        assert reader.read(table[int(number)]) == (contents[number], "png")


MEMORY = """
import sys, pyarrow
from jitscale.preparation.finding import find_sources
from jitscale.preparation.reading import SourceReader
table, reader = find_sources(sys.argv[1:]), SourceReader("/")
sizes = {len(reader.read(table[number])[0]) for number in range(len(table))}
print(len(table), pyarrow.default_memory_pool().max_memory())
"""


@pytest.mark.parametrize("group", [1 << 20, 100])
def test_memory_does_not_grow_with_a_row_group(tmp_path: Path, group: int) -> None:
    """One row group holds 64 MB.

    Its pages have about 1 MB, as C++, Java and Rust write them, or it has many small pages.
    """
    random = np.random.default_rng(0)
    images = [{"bytes": b"\x89PNG\r\n\x1a\n" + random.bytes(32_000), "path": None} for _ in range(2000)]
    path = write(
        pa.table({"image": images, "label": [0] * 2000}),
        tmp_path / "a.parquet",
        row_group_size=group,
        write_batch_size=16,
    )
    assert path.stat().st_size > 60e6
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(path)], env=env, capture_output=True, text=True, check=True
    )
    count, most = map(int, done.stdout.split())
    assert count == 2000
    assert most < 16e6


# Splits


@pytest.mark.parametrize(
    ("files", "split", "chosen"),
    [
        (["data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"], "val", [1]),
        (["data/train-00000-of-00001-0123456789abcdef.parquet", "data/test-00000-of-00001.parquet"], "train", [0]),
        (["plain/test/0000.parquet", "plain/train/0000.parquet", "plain/train/0001.parquet"], "train", [1, 2]),
        (["plain/extra/0000.parquet", "plain/train/0000.parquet"], "extra", [0]),
        (["plain/test-00000-of-00001.parquet", "plain/train_clean-00000-of-00001.parquet"], "train_clean", [1]),
        (["test.parquet", "train.parquet"], "test", [0]),
        (["my_test_images.parquet", "my_train_images.parquet"], "train", [1]),
        (["test/part-00000-of-00001.parquet", "train/part-00000-of-00001.parquet"], "train", [1]),
        (["a.parquet", "b.parquet"], None, [0, 1]),
        (["data/train-00000-of-00001.parquet"], None, [0]),
    ],
)
def test_the_file_name_determines_the_split(
    tmp_path: Path, files: list[str], split: str | None, chosen: list[int]
) -> None:
    for number, name in enumerate(files):
        write(rows(1, label=[number]), tmp_path / "set" / name)
    assert labels_of(tmp_path / "set", split=split) == chosen
    patterns = sorted({name.rpartition("/")[0] for name in files})
    if len(patterns) == 1:
        assert labels_of(tmp_path / "set" / patterns[0] / "*.parquet", split=split) == chosen


def test_ambiguous_splits_are_refused(tmp_path: Path) -> None:
    source = hub_repository(tmp_path / "hub")
    line = f"{source}: holds the splits test, train by the names of its files; pass --split train"
    assert refused_input("--input", source).endswith(line)
    assert "test, train, not dev by" in refused_input("--input", source, "--split", "dev")
    assert "holds the splits test, train" in refused_input("--input", source / "data" / "*.parquet")
    single = source / "data" / "train-00000-of-00002.parquet"
    assert "holds the split train, not test" in refused_input("--input", single, "--split", "test")
    plain = write(rows(1, label=[0]), tmp_path / "a.parquet")
    assert "--split train does not apply to this form" in refused_input("--input", plain, "--split", "train")


def test_files_that_are_not_the_whole_split_are_refused(tmp_path: Path) -> None:
    source = hub_repository(tmp_path / "hub")
    (source / "data" / "train-00000-of-00002.parquet").unlink()
    line = refused_input("--input", source, "--split", "train")
    assert "holds 1 of the 2 files of the split train; number 00000 is missing; download the rest, or give" in line
    table = found(source / "data" / "train-*.parquet")
    assert table.notes == [f"{source}/data/train-*.parquet: 1 of the 2 files of the split train"]
    assert len(table) == 3
    shutil.copy(source / "data" / "train-00001-of-00002.parquet", source / "data" / "train-00000-of-00001.parquet")
    assert "files of 1 and of 2 of one split, from two versions" in refused_input("--input", source, "--split", "train")


def test_partial_conversions_and_several_data_sets_are_refused(tmp_path: Path) -> None:
    for name in ("plain/partial-train/0000.parquet", "plain/test/0000.parquet"):
        write(rows(1, label=[0]), tmp_path / "set" / name)
    line = "holds only the first 5 GB of the split train (folder partial-train); give the data set's own files"
    assert line in refused_input("--input", tmp_path / "set", "--split", "train")
    assert line in refused_input("--input", tmp_path / "set" / "plain" / "partial-train")
    assert len(found(tmp_path / "set", split="test")) == 1
    write(rows(1, label=[0]), tmp_path / "set" / "other" / "test" / "0000.parquet")
    line = refused_input("--input", tmp_path / "set", "--split", "test")
    assert f"holds several data sets ({tmp_path}/set/other, {tmp_path}/set/plain); give one of these" in line


def test_other_images_in_the_folder_are_refused(tmp_path: Path) -> None:
    write(rows(1, label=[0]), tmp_path / "a" / "b.parquet")
    (tmp_path / "z").mkdir()
    (tmp_path / "z" / "c.png").write_bytes(b"x")
    assert "z/c.png, near Parquet or Arrow files; give a folder with one kind" in refused_input("--input", tmp_path)


# Columns


def test_labels_of_every_type(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    index = {"__index_level_0__": [5, 6, 7]}
    for values, expected in [
        (pa.array([2, 0, 1], pa.int8()), [2, 0, 1]),
        (pa.array(["b", "a", "b"]), [1, 0, 1]),
        (pa.array(["b", "a", "b"]).dictionary_encode(), [1, 0, 1]),
        (pa.array(["10", "2", "0"]), [10, 2, 0]),
        (pa.array([1.0, 0.0, 2.0]), [1, 0, 2]),
        (pa.array([None, -1, None], pa.int64()), [NO_LABEL] * 3),
        (pa.array([float("nan")] * 3), [NO_LABEL] * 3),
        (pa.nulls(3), [NO_LABEL] * 3),
    ]:
        assert labels_of(write(rows(3, label=values, **index), path)) == expected
    for value in (-2, LARGEST_LABEL + 1, 0.5):
        write(rows(2, label=[0 * value, value]), path)
        assert f"a.parquet: row 1: label is {value}, neither a class number" in refused_input("--input", path)
    write(rows(2, label=[0, -1]), path)
    assert "row 1: has no label where a number is expected" in refused_input("--input", path)


def test_a_test_split_without_labels_is_reported(tmp_path: Path) -> None:
    table = rows(2, label=[-1, -1]).replace_schema_metadata(metadata(image={"_type": "Image"}, label=CLASSES))
    inputs = found(write(table, tmp_path / "a.parquet"))
    assert (inputs.num_classes, inputs.class_names) == (0, None)
    why = "2 images without classes: label is -1 or empty in all of them, as in a test split"
    assert inputs.notes == [f"{tmp_path}/a.parquet: {why}"]
    inputs = found(write(rows(2), tmp_path / "a.parquet"))
    assert inputs.notes == [
        f"{tmp_path}/a.parquet: 2 images without classes: no column of numbers or names besides image"
    ]


@pytest.mark.parametrize("label", [[True, False], [[0, 1], [1]]])
def test_labels_of_an_unsupported_type_are_refused(tmp_path: Path, label: list[object]) -> None:
    path = write(rows(2, label=label, breed=["x", "y"]), tmp_path / "a.parquet")
    assert "the column label holds neither numbers nor names" in refused_input("--input", path)
    assert found(path, label_column="breed").class_names == ["x", "y"]
    assert labels_of(path, labels="none") == [NO_LABEL] * 2


def test_an_ambiguous_label_column_must_be_named(tmp_path: Path) -> None:
    path = write(rows(2, breed=["x", "y"], age=[3, 4]), tmp_path / "a.parquet")
    line = refused_input("--input", path)
    assert "the file does not say which column holds labels: breed, age; pass --label-column with one of these" in line
    assert found(path, label_column="breed").class_names == ["x", "y"]
    assert labels_of(path, labels="none") == [NO_LABEL] * 2
    line = refused_input("--input", path, "--label-column", "colour")
    assert "no column 'colour' of numbers or names: image, breed, age; correct --label-column" in line
    two = metadata(image={"_type": "Image"}, fine=CLASSES, coarse=CLASSES)
    write(rows(1, fine=[1], coarse=[0]).replace_schema_metadata(two), path)
    assert "classes are in the columns fine, coarse; pass --label-column fine" in refused_input("--input", path)
    assert labels_of(path, label_column="coarse") == [0]


def test_the_image_column_is_found_by_its_bytes_or_must_be_named(tmp_path: Path) -> None:
    images = [file_bytes(image) for image in pictures(4)]
    path = tmp_path / "a.parquet"
    write(pa.table({"id": [b"a", b"b"], "png": images[:2], "label": [0, 1]}), path)
    assert stored(found(path)) == images[:2]
    write(pa.table({"png": images[:2], "mask": images[2:], "label": [0, 1]}), path)
    line = "images are in the columns png, mask"
    assert f"{line}; pass --image-column png" in refused_input("--input", path)
    assert f"{line}, not in label; pass" in refused_input("--input", path, "--image-column", "label")
    pack(path, tmp_path / "out", "--image-column", "mask")
    assert np.array_equal(images_and_labels(tmp_path / "out")[0], pictures(4)[2:])
    write(pa.table({"id": [b"a"], "label": [0]}), path)
    assert "no column holds images: id, label; give files with" in refused_input("--input", path)


def test_files_of_other_columns_or_classes_are_not_mixed(tmp_path: Path) -> None:
    write(rows(1, label=[0]), tmp_path / "a.parquet")
    write(rows(1, cls=[0]), tmp_path / "b.parquet")
    line = refused_input("--input", tmp_path)
    assert "b.parquet: has its images and labels in image and cls, not in image and label as" in line
    for name, names in (("a", NAMES), ("b", NAMES[::-1])):
        noted = metadata(image={"_type": "Image"}, label={"_type": "ClassLabel", "names": names})
        write(rows(1, label=[0]).replace_schema_metadata(noted), tmp_path / f"{name}.parquet")
    assert "b.parquet: names other classes than" in refused_input("--input", tmp_path)


CARD = """---
license: mit
dataset_info:
- config_name: other
  features: [{name: label, dtype: {class_label: {names: {'0': wrong, '1': names}}}}]
- config_name: plain
  features:
  - {name: image, dtype: image}
  - name: label
    dtype:
      class_label:
        names:
          '0': zebra
          '1': ant
          '2': moth
---
# A data set
"""


def write_names(path: Path, *names: str) -> Path:
    path.write_text("\n".join(names))
    return path


def test_class_names_come_from_the_card_or_the_user(tmp_path: Path) -> None:
    write(rows(2, label=[2, 0]), tmp_path / "plain" / "train" / "0000.parquet")
    assert found(tmp_path).class_names is None
    (tmp_path / "README.md").write_text(CARD)
    assert found(tmp_path).class_names == NAMES
    renamed = found(tmp_path, class_names=["a", "b", "c"])
    assert (renamed.class_names, renamed.table["label"].tolist()) == (["a", "b", "c"], [2, 0])
    (note,) = renamed.notes
    assert note.endswith("renames its classes: class 0 is 'zebra' there, and is called 'a' now")
    in_order = ["ant", "cow", "moth", "zebra"]  # A class keeps its name, but not its number.
    assert labels_of(tmp_path, class_names=in_order) == [2, 3]
    line = refused_input("--input", tmp_path, "--class-names", str(write_names(tmp_path / "names.txt", "ant", "moth")))
    assert "row 1: has label 'zebra', none of the 2 classes" in line
    (tmp_path / "README.md").write_text("---\na: [\n---\n")
    assert "README.md: its head is no YAML" in refused_input("--input", tmp_path)
