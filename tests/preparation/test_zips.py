"""Images inside of zips, which are read in place."""

import json
import struct
import zipfile
from pathlib import Path

import pytest

from jitscale.preparation.sources import Storage
from tests.preparation.inputs import CONTENT, inputs_of, read, refused
from tests.preparation.packing_jobs import alone, samples
from tests.support.pictures import numbered_png

CLASSES = ["cat/0.png", "cat/deep/1.png", "dog/2.png"]


def write_zip(path: Path, *names: str, method: int = zipfile.ZIP_STORED, **texts: str) -> Path:
    """Write a zip of images whose pixels state their place among `names`, then of texts."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for number, name in enumerate(names):
            info = zipfile.ZipInfo(name)
            info.compress_type = method
            info.extra = struct.pack("<HH4s", 0x7777, 4, b"more")  # The local header repeats it.
            archive.writestr(info, b"" if name.endswith("/") else numbered_png(4, number))
        for name, text in texts.items():
            archive.writestr(name.replace("_", "."), text)
    return path


@pytest.mark.parametrize(
    ("method", "storage"), [(zipfile.ZIP_STORED, Storage.BYTES), (zipfile.ZIP_DEFLATED, Storage.DEFLATED)]
)
def test_edm_zips_are_read(tmp_path: Path, method: int, storage: Storage) -> None:
    names = [f"{number // 2:05d}/img{number:08d}.png" for number in range(4)]
    labels = json.dumps({"labels": [[name, row % 3] for row, name in enumerate(names)]})
    path = write_zip(tmp_path / "edm.zip", *names, method=method, dataset_json=labels)
    assert read(path) == {0: 0, 1: 1, 2: 2, 3: 0}
    assert {inputs_of(path)[row].storage for row in range(4)} == {storage}
    finished = alone(path, tmp_path / "out", codec="original")
    assert finished.code == 0, finished.err
    found = [(one["png"], one["cls"]) for _, one in sorted(samples(tmp_path / "out").items())]
    assert found == [(numbered_png(4, row), str(row % 3).encode()) for row in range(4)]


def test_local_headers_of_another_length_are_read(tmp_path: Path) -> None:
    """zip64 has such headers: the lengths in the directory's entry do not determine where the bytes begin."""
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number, name in enumerate(("cat/0.png", "dog/1.png")):
            with archive.open(name, "w", force_zip64=True) as file:
                file.write(numbered_png(4, number))
    assert read(path) == {0: 0, 1: 1}


def test_zips_of_classes_and_of_images_are_read(tmp_path: Path) -> None:
    """The classes are found as in folders. A folder around everything is not a class."""
    path = write_zip(tmp_path / "a.zip", *CLASSES, "empty/", "__MACOSX/cat/._0.png", ".git/3.png", "cat/.4.png")
    inputs = inputs_of(path)
    assert (read(path), inputs.class_names) == ({0: 0, 1: 0, 2: 1}, ["cat", "dog"])
    assert inputs.notes == [f"skipped: {path}/__MACOSX (hidden), {path}/.git (hidden)"]
    around = write_zip(tmp_path / "b.zip", "README.md", *(f"photos/all/{name}" for name in CLASSES))
    assert inputs_of(around).class_names == ["cat", "dog"]
    flat = write_zip(tmp_path / "c.zip", "photos/0.png", "photos/1.png")
    assert inputs_of(flat).num_classes == 0
    assert inputs_of(flat).notes == [f"{flat}: the folder photos holds all images, so it is no class"]
    assert inputs_of(flat, labels="folders").class_names == ["photos"]


def test_zips_with_metadata_and_with_tables_are_read(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", *CLASSES, metadata_csv="file_name,label\ndog/2.png,5\ncat/0.png,3\n")
    assert read(path) == {2: 5, 0: 3}
    path = write_zip(tmp_path / "b.zip", *CLASSES, labels_csv="path,label\n")
    refused(r"b.zip/labels.csv: lies among the images and seems to hold labels; pass --labels FILE", path)
    (tmp_path / "l.txt").write_text("cat/0.png 4\ncat/deep/1.png 2\n")
    assert read(path, labels=str(tmp_path / "l.txt")) == {0: 4, 1: 2}
    assert read(path, labels="folders") == {0: 0, 1: 0, 2: 1}


def test_zips_of_splits_are_read(tmp_path: Path) -> None:
    """The splits lie in one zip, or in one zip each."""
    path = write_zip(tmp_path / "a.zip", "x/train/cat/0.png", "x/train/dog/1.png", "x/val/cat/2.png")
    refused(r"a.zip/x: train and val are parts of a data set.*; pass --split train", path)
    assert read(path, split="train") == {0: 0, 1: 1}
    folder = tmp_path / "zips"
    folder.mkdir()
    write_zip(folder / "data_train.zip", "cat/0.png", "dog/1.png")
    write_zip(folder / "data_val.zip", "cat/0.png", "dog/1.png", "dog/2.png")
    refused(r"several splits \(data_train.zip and data_val.zip\); pass --split train for one", folder)
    assert read(folder, split="validation") == {0: 0, 1: 1, 2: 1}
    refused("holds no file of the split test, but data_train.zip and data_val.zip", folder, split="test")


def test_unreadable_zips_are_refused(tmp_path: Path) -> None:
    for method, name in ((zipfile.ZIP_BZIP2, "bzip2"), (zipfile.ZIP_LZMA, "lzma")):
        path = write_zip(tmp_path / "a.zip", *CLASSES, method=method)
        refused(f"a.zip: cat/0.png is compressed by {name}, which is not read; write the zip again", path)
    whole = write_zip(tmp_path / "a.zip", *CLASSES).read_bytes()
    entry = whole.index(b"PK\x01\x02")
    (tmp_path / "a.zip").write_bytes(whole[: entry + 8] + b"\1\0" + whole[entry + 10 :])  # the flags of the entry
    refused("a.zip: cat/0.png is encrypted; unzip it with its password", tmp_path / "a.zip")
    (tmp_path / "a.zip").write_bytes(whole[:-30])
    refused("a.zip: cannot be read as a zip .*; copy it again", tmp_path / "a.zip")
    second = whole.index(b"PK\x03\x04", 4)
    (tmp_path / "a.zip").write_bytes(whole[:second] + b"XX" + whole[second + 2 :])
    refused(f"a.zip: byte {second}: no header of cat/deep/1.png; copy the zip again", tmp_path / "a.zip")
    refused("a.zip: no image in it", write_zip(tmp_path / "a.zip", a_txt="x"))
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = write_zip(tmp_path / "a.zip", "cat/0.png", "cat/0.png")
    refused("a.zip/cat/0.png: is there twice; write the archive again", path)


def test_a_zip_next_to_images_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "0.png").write_bytes(CONTENT)
    write_zip(tmp_path / "cat.zip", *CLASSES)
    inputs = inputs_of(tmp_path)
    assert (len(inputs), inputs.ignored) == (1, {"zip": 1})
