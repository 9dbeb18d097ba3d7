"""Labels in files next to images: EDM's dataset.json, metadata of image folders, and tables that the user names."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jitscale.data.tar_index import NO_LABEL
from tests.preparation.inputs import inputs_of, pictures, read, refused, tree
from tests.preparation.packing_jobs import alone, samples
from tests.support.pictures import noise, numbered_png, write_tar

EDM = [f"{number // 2:05d}/img{number:08d}.png" for number in range(4)]


def edm(folder: Path, labels: Any, names: list[str] = EDM) -> Path:
    pictures(folder, *names)
    (folder / "dataset.json").write_text(labels if isinstance(labels, str) else json.dumps({"labels": labels}))
    return folder


# EDM, EDM2, StyleGAN


def test_edm_folders_are_read(tmp_path: Path) -> None:
    labels = [2, 0, 1, 2]
    folder = edm(tmp_path, [list(pair) for pair in zip(EDM, labels, strict=True)][::-1])
    assert read(folder) == dict(enumerate(labels))
    assert inputs_of(folder).class_names is None
    assert inputs_of(folder).num_classes == 3
    assert read(folder, labels="folders") == {0: 0, 1: 0, 2: 1, 3: 1}  # The user chooses the folders.
    assert read(folder, labels="none") == dict.fromkeys(range(4), NO_LABEL)


def test_edm_without_labels(tmp_path: Path) -> None:
    folder = edm(tmp_path, None)
    inputs = inputs_of(folder)
    assert (len(inputs), inputs.num_classes) == (4, 0)
    assert inputs.notes == [f"{folder}/dataset.json: says that there are no labels"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            '{"labels": [["00000/img00000000.png", 1],]}',
            r"dataset.json: is no JSON .* \(JSON allows no trailing comma\)",
        ),
        ('{"labels": 3}', "dataset.json: holds no list of labels; write"),
        ([[name, [0.0, 1.0]] for name in EDM], "labels are vectors, as that of 00000/img00000000.png"),
        ([[name, True] for name in EDM], "has label True, which is no integer from 0"),
        ([[name, -1] for name in EDM], "has label -1, which is no integer from 0"),
        ([[EDM[0]]], "entry 0 is .*, not an image with its label"),
        ([[name, 1] for name in [*EDM, EDM[0]]], "names 00000/img00000000.png twice"),
        ([[name, 1] for name in EDM[1:]], "names no label for 1 images .00000/img00000000.png.; add them, or pass"),
        ([[name, 1] for name in [*EDM, "x.png"]], r"names 1 files that are not there \(x.png\); copy them"),
        (
            [[name[:-3] + "jpg", 1] for name in EDM],
            r"names 4 files that are not there .*; images with these names and another extension",
        ),
    ],
)
def test_invalid_edm_labels_are_refused(tmp_path: Path, labels: Any, message: str) -> None:
    refused(message, edm(tmp_path, labels))


def test_labels_from_one_leave_a_class_empty(tmp_path: Path) -> None:
    (note,) = inputs_of(edm(tmp_path, [[name, 1 + row % 2] for row, name in enumerate(EDM)])).notes
    assert "no image has label 0, so class 0 is empty" in note


def test_buckets_of_a_thousand_images_are_not_classes(tmp_path: Path) -> None:
    """EDM's recipe for FFHQ stores its images in such buckets."""
    names = [f"{number // 1000:05d}/img{number:08d}.png" for number in (0, 1, 1000, 2999)]
    folder = edm(tmp_path, [[name, int(name[:5])] for name in names], names)
    inputs = inputs_of(folder)
    assert (len(inputs), inputs.num_classes) == (4, 0)
    assert "they are not used; --labels" in inputs.notes[0]
    assert read(folder, labels=str(folder / "dataset.json")) == {0: 0, 1: 0, 2: 1, 3: 2}
    assert read(edm(tmp_path, [[name, 1] for name in names], names)) == dict.fromkeys(range(4), 1)


def test_buckets_without_a_file_are_not_classes(tmp_path: Path) -> None:
    for folder, names in [
        ("ffhq", ["00000/00000.png", "00000/00999.png", "01000/01000.png"]),
        ("edm", ["00000/img00000003.png", "00001/img00001999.png"]),
    ]:
        inputs = inputs_of(tree(tmp_path / folder, *names))
        assert (len(inputs), inputs.num_classes) == (len(names), 0)
        assert "hold a thousand images each, by their numbers, and are no classes; --labels folders" in inputs.notes[0]
        assert inputs_of(tmp_path / folder, labels="folders").num_classes == 2
    assert inputs_of(tree(tmp_path / "classes", "00000/00000.png", "00001/00001.png")).num_classes == 2


def test_latents_are_refused_and_arrays_of_pixels_read(tmp_path: Path) -> None:
    stream = io.BytesIO()
    np.save(stream, noise(1))
    name = "00000/img00000000.npy"
    folder = edm(tmp_path / "arrays", [[name, 0]], [name])
    (folder / name).write_bytes(stream.getvalue())
    assert inputs_of(folder).table["extension"].tolist() == [b"npy"]
    latents = "00000/img-mean-std-00000000.npy"
    message = "img-mean-std-00000000.npy: holds VAE latents of EDM2, not pixels; give the zip"
    refused(message, edm(tmp_path / "latents", [[latents, 0]], [latents]))
    refused(message, tree(tmp_path / "more", "cat/a.png", f"cat/{latents}"))


# Image folders with metadata


def metadata(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "metadata.parquet"])
def test_image_folders_with_metadata(tmp_path: Path, name: str) -> None:
    """The metadata lie above the images, whose folder is not a class. Not all images are named."""
    pictures(tmp_path, "images/a.png", "images/b.png", "images/c.png")
    rows = [{"file_name": "images/c.png", "label": "dog", "text": "x"}, {"file_name": "images/a.png", "label": "cat"}]
    metadata(tmp_path / name, [{"text": "y", **row} for row in rows])
    assert read(tmp_path) == {2: 1, 0: 0}
    inputs = inputs_of(tmp_path)
    assert inputs.class_names == ["cat", "dog"]
    expected = f"{tmp_path}/{name}: does not name 1 images, which are left out (images/b.png)"
    assert inputs.notes == [expected]
    assert inputs_of(tmp_path, label_column="text").class_names == ["x", "y"]


def test_metadata_without_labels_or_with_unusual_labels(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png")
    table = tmp_path / "metadata.csv"
    metadata(table, [{"file_name": "a.png"}, {"file_name": "b.png"}])
    assert inputs_of(tmp_path).num_classes == 0
    metadata(table, [{"image_file_name": "a.png", "breed": "cat"}, {"image_file_name": "b.png", "breed": "dog"}])
    refused("line 1: no 'label' among 'image_file_name', 'breed'; pass --label-column", tmp_path)
    refused("line 1: no 'colour' among 'image_file_name', 'breed'", tmp_path, label_column="colour")
    assert read(tmp_path, label_column="breed") == {0: 0, 1: 1}
    metadata(tmp_path / "two.csv", [{"image_file_name": "a.png", "mask_file_name": "b.png"}])
    message = (
        r"line 1: several columns name files \(image_file_name, mask_file_name\); call that of the images file_name"
    )
    refused(message, tmp_path, labels=str(tmp_path / "two.csv"))
    assert inputs_of(tmp_path, labels="none").num_classes == 0
    metadata(tmp_path / "metadata.jsonl", [{"file_name": "a.png"}])
    refused("holds metadata.csv and metadata.jsonl; pass --labels FILE", tmp_path)
    assert inputs_of(tmp_path, labels=str(table), label_column="breed").class_names == ["cat", "dog"]


def test_a_text_of_several_columns_between_tabs(tmp_path: Path) -> None:
    """This is the format of tiny-imagenet's val_annotations.txt, where a box follows the class."""
    pictures(tmp_path / "val", "images/val_0.png", "images/val_1.png")
    text = tmp_path / "val" / "val_annotations.txt"
    text.write_text("val_0.png\tn02\t0\t32\t44\t62\nval_1.png\tn01\t52\t55\t57\t59\n")
    refused("val_annotations.txt: lies among the images and seems to hold labels", tmp_path / "val")
    assert read(tmp_path / "val", labels=str(text)) == {0: 1, 1: 0}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("../a.png,1", r"line 2: '../a.png' leads out of the folder"),
        ("/a.png,1", r"line 2: '/a.png' leads out of the folder"),
        ("https://x/a.png,1", r"line 2: 'https://x/a.png' leads out of the folder"),
        ("a.png,1\na.png,2", "names a.png twice"),
        ("a.png,1\nx.png,2\ny.png,3", r"metadata.csv: names 2 files that are not there \(x.png, y.png\)"),
        (",1", "line 2: has no path"),
        ("a.png,1.5", "line 2: label '1.5' is neither"),
    ],
)
def test_invalid_metadata_is_refused(tmp_path: Path, row: str, message: str) -> None:
    pictures(tmp_path, "a.png")
    (tmp_path / "metadata.csv").write_text(f"file_name,label\n{row}\n")
    refused(message, tmp_path)


def test_metadata_of_splits(tmp_path: Path) -> None:
    """They lie in the folder of each split, or above both."""
    pictures(tmp_path / "each", "train/a.png", "test/b.png")
    for split, image in (("train", "a.png"), ("test", "b.png")):
        metadata(tmp_path / "each" / split / "metadata.csv", [{"file_name": image, "label": 7}])
    refused("test and train are parts of a data set", tmp_path / "each")
    assert read(tmp_path / "each", split="train") == {0: 7}
    pictures(tmp_path / "above", "train/a.png", "test/b.png")
    rows = [{"file_name": "train/a.png", "label": 1}, {"file_name": "test/b.png", "label": 2}]
    metadata(tmp_path / "above" / "metadata.csv", rows)
    refused("test and train are parts of a data set", tmp_path / "above")
    assert read(tmp_path / "above", split="test") == {1: 2}


# Tables that the user names


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("l.csv", "path,label\nx/a.png,cat\nx/b.png,dog\n"),
        ("l.csv", "label,file_name\ncat,a.png\ndog,b.png\n"),
        ("l.tsv", "path\tlabel\tmore\nx/a.png\tcat\t1\nx/b.png\tdog\t2\n"),
        ("l.jsonl", '{"path": "x/a.png", "label": "cat"}\n{"path": "x/b.png", "label": "dog"}\n'),
        ("l.txt", "x/a.png cat\nx/b.png\tdog\n\n"),
        ("trainLabels.csv", "id,breed\na,cat\nb,dog\n"),  # Kaggle's format
        ("l.csv", "image,breed\na.png,cat\nb.png,dog\n"),
    ],
)
def test_tables_of_labels(tmp_path: Path, name: str, text: str) -> None:
    """Tables next to the images are refused until the user names them.

    Tables elsewhere and tables for a tar work too.
    """
    pictures(tmp_path / "in", "x/a.png", "x/b.png", "x/c.png")
    for table in (tmp_path / name, tmp_path / "in" / name, tmp_path / "in" / "x" / name):
        table.write_text(text)
        inputs = inputs_of(tmp_path / "in", labels=str(table))
        assert read(tmp_path / "in", labels=str(table)) == {0: 0, 1: 1}
        assert inputs.class_names == ["cat", "dog"]
        assert any("does not name 1 images, which are left out (" in note for note in inputs.notes)
        if table.parent != tmp_path:
            assert len(inputs_of(tmp_path / "in", labels="folders")) == 3
            table.unlink()
    tar = write_tar(
        tmp_path / "in.tar", *[(f"x/{letter}.png", numbered_png(4, row)) for row, letter in enumerate("abc")]
    )
    assert read(tar, labels=str(tmp_path / name)) == {0: 0, 1: 1}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.csv", "id,breed,size\na,cat,3\n", "line 1: no 'label' among 'id', 'breed', 'size'; pass --label-column"),
        ("l.csv", "id,breed\nq,cat\n", r"l.csv: names no image of .*: it names q, the images are x/a.png, y/a.png"),
        ("l.csv", "id,breed\na,cat\n", r"l.csv: a may be several images of .*; write their paths"),
        ("l.csv", "id,breed\na,cat\nq,cat\n", "a may be several images"),
        ("l.txt", "x/a.png\n", r"line 1: 'x/a.png' is no image and label; write lines such as 'a.jpg 0'"),
        ("l.mat", "", "l.mat: is no file of labels that is read; give a .csv, .tsv,"),
        ("l.parquet", "", "l.parquet: cannot be read as parquet"),
    ],
)
def test_invalid_tables_of_labels_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    pictures(tmp_path / "in", "x/a.png", "y/a.png")
    (tmp_path / name).write_text(text)
    refused(message, tmp_path / "in", labels=str(tmp_path / name))


def test_a_missing_file_of_labels_or_one_for_several_inputs_is_refused(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        pictures(tmp_path / folder, "a.png")
    refused(
        "nothing: cannot be read .*; correct --labels: folders, none, or a file", tmp_path / "one", labels="nothing"
    )
    (tmp_path / "l.txt").write_text("a.png 0\n")
    both = tmp_path / "one", tmp_path / "two"
    refused("l.txt: holds the labels of one folder or archive", *both, labels=str(tmp_path / "l.txt"))


def test_options_without_an_effect_are_refused(tmp_path: Path) -> None:
    pictures(tmp_path, "cat/a.png", "dog/b.png")
    for name, flag in (("label_key", "--label-key"), ("label_column", "--label-column"), ("split", "--split")):
        refused(f"{tmp_path}: {flag} cls does not apply to this form of data; leave it out", tmp_path, **{name: "cls"})


def test_packed_pixels_and_labels_equal_those_of_the_file(tmp_path: Path) -> None:
    folder = edm(tmp_path / "in", [[name, row % 2] for row, name in enumerate(EDM)])
    finished = alone(folder, tmp_path / "out", codec="original")
    assert finished.code == 0, finished.err
    found = samples(tmp_path / "out")
    assert [(one["png"], one["cls"]) for _, one in sorted(found.items())] == [
        ((folder / name).read_bytes(), str(row % 2).encode()) for row, name in enumerate(EDM)
    ]
