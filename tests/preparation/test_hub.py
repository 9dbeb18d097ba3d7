"""Data sets at hf:// addresses, and the hub's cache. A local file system with the same interface replaces the hub."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.preparation.packing_jobs import command, finish, images_and_labels, refused_input, start
from tests.preparation.row_inputs import NAMES, SIZE, data_set, found, labels_of, pictures, rows, write
from tests.support import ROOT
from tests.support.local_hub import bytes_read, environment_of
from tests.support.pictures import file_bytes

ROWS = 2000
CARD = """---
dataset_info:
  features:
  - name: label
    dtype: {class_label: {names: {'0': zebra, '1': ant, '2': moth}}}
---
"""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that replaces the hub, with one data set."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name, value in environment_of(tmp_path / "hub", tmp_path / "packages").items():
        monkeypatch.setenv(name, value)
    folder = tmp_path / "hub" / "datasets" / "we" / "letters"
    train = rows(ROWS, label=[0, 1, 2, 1] * (ROWS // 4))
    write(train, folder / "data" / "train-00000-of-00001.parquet", row_group_size=100)
    write(rows(1, label=[0]), folder / "data" / "test-00000-of-00001.parquet")
    (folder / "README.md").write_text(CARD)
    return folder


def test_an_address_is_packed_by_worker_processes(hub: Path, tmp_path: Path) -> None:
    more = ["--resolution", str(SIZE), "--samples-per-shard", "450", "--split", "train"]
    arguments = command("hf://datasets/we/letters", tmp_path / "out", *more)
    code, out, err = finish(start(arguments, os.environ["PYTHONPATH"]))
    assert (code, err) == (0, "")
    assert "2000 images, 3 classes (0 zebra, 1 ant, 2 moth), 5 shards" in out
    images, labels = images_and_labels(tmp_path / "out")
    assert np.array_equal(images, pictures(ROWS))
    assert labels == [0, 1, 2, 1] * (ROWS // 4)
    # Every row group is read once, or twice if two shards share it. Three processes read the end of the file.
    size = (hub / "data" / "train-00000-of-00001.parquet").stat().st_size
    assert bytes_read(tmp_path / "packages") < 2 * size
    packing = json.loads((tmp_path / "out" / "packing.json").read_text())
    assert packing["options"]["input"] == ["hf://datasets/we/letters"]
    code, out, err = finish(start(arguments, os.environ["PYTHONPATH"]))
    assert "is there already" in out, err


FIND = """
import sys
from jitscale.errors import DataError
from jitscale.preparation.finding import find_sources
from jitscale.preparation.forms.search import FindOptions
for pair in sys.argv[1:]:
    split, _, addresses = pair.partition("|")
    try:
        table = find_sources(addresses.split(), FindOptions(split=split or None))
        print(len(table), table.class_names, table[0].path)
    except DataError as error:
        print(error)
"""


def said_of(*pairs: str) -> list[str]:
    """The images at each SPLIT|ADDRESSES, or the refusal. A process that sees the hub of the test looks for them."""
    done = subprocess.run([sys.executable, "-c", FIND, *pairs], capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    assert len(lines) == len(pairs), done.stderr
    return lines


def test_images_at_addresses_are_found(hub: Path) -> None:
    name, train = "hf://datasets/we/letters", "data/train-00000-of-00001.parquet"
    found = f"{ROWS} {NAMES} {name}/{train}"
    places = ("", "/data", "/data/*.parquet", f"/{train}")
    *said, asked = said_of(*(f"train|{name}{place}" for place in places), f"|{name}/data/*.parquet")
    assert said == [found] * 4
    assert f"{name}/data/*.parquet: holds the splits test, train by the names of its files; pass --split" in asked
    hub.rename(hub.parent / "letters@1a2b")
    assert said_of(f"test|{name}@1a2b") == [f"1 {NAMES} {name}@1a2b/data/test-00000-of-00001.parquet"]


def test_wrong_addresses_are_refused(hub: Path) -> None:
    (hub.parent / "tars").mkdir()
    (hub.parent / "tars" / "a.tar").write_bytes(b"x")
    mine = hub / "mine.png"
    mine.write_bytes(file_bytes(pictures(1)[0]))
    write(pa.table({"image": [{"bytes": None, "path": str(mine)}]}), hub.parent / "far" / "a.parquet")
    places = ["hf://we/letters", *(f"hf://datasets/we/{name}" for name in ("none", "tars", "far"))]
    twice = "hf://datasets/we/letters hf://datasets/we/letters/"
    model, none, tars, far, same = said_of(*(f"|{place}" for place in (*places, twice)))
    assert "hf://we/letters: is no address of a data set; write hf://datasets/OWNER/NAME" in model
    assert "hf://datasets/we/none: there is no such file; correct" in none
    download = "hf download we/tars --repo-type dataset --local-dir FOLDER"
    assert f"holds no Parquet files, but .tar 1; download it ({download}) and give the folder" in tars
    # The file exists, but data of another machine must not name files of this one.
    assert f"row 0 names {mine}, which is not here" in far
    assert "is given twice" in same


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "huggingface_hub.py").write_text("raise ModuleNotFoundError('none', name='huggingface_hub')\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    (line,) = said_of("|hf://datasets/we/letters")
    assert "hf://datasets/we/letters: a package for this storage is not installed" in line
    assert line.endswith("pip install 'jitscale[hub]'")


# The cache


def cached(folder: Path, revisions: list[str], main: str | None) -> Path:
    """Trees of links, as huggingface_hub writes them to its cache."""
    (folder / "blobs").mkdir(parents=True)
    (folder / "refs").mkdir()
    data_set([2, 0, 1]).to_parquet(folder / "blobs" / "0f1e2d")
    for revision in revisions:
        data = folder / "snapshots" / revision / "data"
        data.mkdir(parents=True)
        (data / "train-00000-of-00001.parquet").symlink_to("../../../blobs/0f1e2d")
    if main is not None:
        (folder / "refs" / "main").write_text(main)
    return folder


def test_links_in_the_cache_of_the_hub_are_followed(tmp_path: Path) -> None:
    assert labels_of(cached(tmp_path / "datasets--we--one", ["1a2b"], None)) == [2, 0, 1]
    two = cached(tmp_path / "datasets--we--two", ["1a2b", "3c4d"], "3c4d")
    inputs = found(two)
    assert inputs[0].path == str(two / "snapshots" / "3c4d" / "data" / "train-00000-of-00001.parquet")
    assert inputs.class_names == NAMES
    assert labels_of(two / "snapshots" / "1a2b") == [2, 0, 1]
    (two / "blobs" / "0f1e2d").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    line = "train-00000-of-00001.parquet: is a git-lfs pointer of 63 bytes, not the data; run git lfs pull"
    assert refused_input("--input", two).endswith(line)
    lost = cached(tmp_path / "datasets--we--lost", ["1a2b", "3c4d"], "9f9f")
    line = refused_input("--input", lost)
    assert f"holds 2 revisions, and none of them is main; give one of them: {lost}/snapshots/REVISION" in line
