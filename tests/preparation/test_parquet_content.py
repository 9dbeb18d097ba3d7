"""Wrong content of Parquet files: ImageNet's labels in another order, images stored elsewhere, damage."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from jitscale.data.manifest import Manifest
from tests.preparation.packing_jobs import alone, images_and_labels, refused_input
from tests.preparation.row_inputs import SIZE, data_set, found, labels_of, pictures, rows, stored, write
from tests.support import ROOT
from tests.support.pictures import file_bytes

WNIDS = [f"n{number:08d}" for number in range(100, 1100)]


def imagenet(path: Path, labels: list[int], wnids: list[str]) -> Path:
    """Rows as in ILSVRC/imagenet-1k. The images themselves are never read."""
    image = {"bytes": file_bytes(pictures(1)[0])}
    images = [{**image, "path": f"ILSVRC2012_val_{row:08d}_{wnid}.JPEG"} for row, wnid in enumerate(wnids)]
    return write(pa.table({"image": images, "label": labels}), path)


def test_labels_are_compared_with_the_wnids_in_paths(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    assert labels_of(imagenet(path, [5, 3, 5], ["n00000005", "n00000003", "n00000005"])) == [5, 3, 5]
    imagenet(path, [5, 3, 4], ["n00000005", "n00000003", "n00000005"])
    line = refused_input("--input", path)
    assert f"{path}: row 2: has label 4, but n00000005 has label 5 in {path}: row 0; the file is wrong" in line
    imagenet(path, [5, 5], ["n00000005", "n00000003"])
    line = refused_input("--input", path)
    assert f"{path}: row 1: n00000003 has label 5, as n00000005 in {path}: row 0; the file is wrong" in line
    assert labels_of(path, class_names=list("abcdef")) == [5, 5]


def test_labels_in_another_order_than_imagenets_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    assert labels_of(imagenet(path, list(range(1000)), WNIDS)) == list(range(1000))
    imagenet(path, [0, 2, 1, *range(3, 1000)], WNIDS)
    line = refused_input("--input", path)
    assert f"row 1: {WNIDS[1]} has label 2, and 1 in the order of ImageNet's WNIDs; the file is wrong" in line
    assert "name them with --class-names" in line


# Images elsewhere


def test_rows_that_contain_paths(tmp_path: Path) -> None:
    """`Dataset.to_parquet` stores no images: its rows are paths on the machine that wrote them."""
    (tmp_path / "photos").mkdir()
    for number, image in enumerate(pictures(3)):
        (tmp_path / "photos" / f"{number}.png").write_bytes(file_bytes(image))
    names = [str(tmp_path / "photos" / f"{number}.png") for number in range(3)]
    here = data_set([0, 1, 2]).remove_columns("image").add_column("image", names).cast(data_set([0]).features)
    here.to_parquet(tmp_path / "a.parquet")
    assert stored(found(tmp_path / "a.parquet")) == [file_bytes(image) for image in pictures(3)]
    relative = [{"bytes": None, "path": f"photos/{number}.png"} for number in range(3)]
    write(pa.table({"image": relative, "label": [0, 1, 2]}), tmp_path / "b.parquet")
    assert stored(found(tmp_path / "b.parquet")) == [file_bytes(image) for image in pictures(3)]
    (tmp_path / "photos" / "1.png").unlink()
    line = refused_input("--input", tmp_path / "a.parquet")
    assert f"row 1 names {names[1]}, which is not here, and holds no image; push_to_hub and save_to_disk embed" in line


def test_a_row_without_an_image_counts_as_a_bad_image(tmp_path: Path) -> None:
    images = [{"bytes": file_bytes(image), "path": "x.png"} for image in pictures(3)]
    images[1]["bytes"] = None
    write(pa.table({"image": images, "label": [0, 1, 2]}), tmp_path / "a.parquet")
    assert alone(tmp_path / "a.parquet", tmp_path / "out", "--resolution", str(SIZE)).code == 0
    manifest = Manifest.read(tmp_path / "out" / "manifest.json")
    assert [(bad.source, bad.reason) for bad in manifest.bad] == [(f"{tmp_path}/a.parquet: row 1", "has no bytes")]
    assert images_and_labels(tmp_path / "out")[1] == [0, 2]


# Damage


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    whole = write(rows(60, label=[0] * 60), tmp_path / "a.parquet", row_group_size=10).read_bytes()
    for damaged in (whole[:-100], whole[: len(whole) // 2]):
        (tmp_path / "a.parquet").write_bytes(damaged)
        assert "a.parquet: is damaged, or pyarrow cannot read it" in refused_input("--input", tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    line = "a.parquet: is neither a folder, a .tar, a .parquet, a .csv nor a .jsonl by its first bytes"
    assert line in refused_input("--input", tmp_path)
    assert line in refused_input("--input", tmp_path / "a.parquet")


def test_a_damaged_row_group_loses_only_its_images(tmp_path: Path) -> None:
    path = write(
        rows(30, label=[0] * 30), tmp_path / "a.parquet", row_group_size=5, compression="none", use_dictionary=False
    )
    content = bytearray(path.read_bytes())
    at = content.index(file_bytes(pictures(30)[10]))  # the first image of the third group
    content[at - 4 : at] = b"\xff\xff\xff\x7f"  # the length of that image
    path.write_bytes(content)
    done = alone(path, tmp_path / "out", "--resolution", str(SIZE))
    assert done.code == 0, done.err
    manifest = Manifest.read(tmp_path / "out" / "manifest.json")
    assert [bad.source for bad in manifest.bad] == [f"{path}: row {row}" for row in range(10, 15)]
    assert manifest.bad[0].reason.startswith("cannot be read (")


@pytest.mark.parametrize(("package", "extra"), [("pyarrow", "parquet")])
def test_a_missing_package_is_named(tmp_path: Path, package: str, extra: str) -> None:
    path = write(rows(1, label=[0]), tmp_path / "a.parquet")
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / f"{package}.py").write_text(f"raise ModuleNotFoundError('none', name={package!r})\n")
    code = "import sys; from jitscale.preparation.finding import find_sources; find_sources(sys.argv[1:])"
    env = {**os.environ, "PYTHONPATH": f"{tmp_path / 'gone'}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code, str(path)], env=env, capture_output=True, text=True, check=False)
    line = f"{path}: needs {package}, which is missing; pip install 'jitscale[{extra}]'"
    assert done.stderr.splitlines()[-1] == f"jitscale.errors.DataError: {line}"
