"""webdataset tars in the forms of the hub: labels in json, `_info.json`, splits, and tars of folders."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from jitscale.data.find import find_tars
from jitscale.data.manifest import Manifest
from jitscale.data.shards import ShardSet
from jitscale.data.tar_index import NO_LABEL
from jitscale.data.tar_labels import LabelKey
from jitscale.errors import DataError
from jitscale.preparation.array_shards import write_shards
from jitscale.preparation.survey import Survey, survey
from tests.preparation.inputs import inputs_of, read, refused
from tests.preparation.surveying import defects
from tests.support.pictures import numbered, numbered_png, samples_of, write_tar
from tests.support.tools import run_tool


def hub_tar(path: Path, *values: Any, first: int = 0) -> Path:
    """A tar with one sample for each of the values, which is its json. A text is written unchanged."""
    members = []
    for number, value in enumerate(values, start=first):
        text = value if isinstance(value, str) else json.dumps(value)
        members += [(f"{number:05d}.jpg", numbered_png(8, number)), (f"{number:05d}.json", text.encode())]
    path.parent.mkdir(exist_ok=True)
    return write_tar(path, *members)


def surveyed(folder: Path, key: str) -> Survey:
    found = survey(find_tars(str(folder)), None, 1, key=LabelKey.parse(key))
    if not found.defects:
        found.write()
    return found


@pytest.mark.parametrize(
    ("key", "values", "labels", "names"),
    [
        ("json:label", [{"label": 2}, {"label": 0}], [2, 0], None),
        ("json:class", [{"class": "dog", "label": 7}, {"class": "cat"}], [1, 0], ["cat", "dog"]),
        ("json:a.b", [{"a": {"b": 1}}, {"a": {"b": "0"}}], [1, 0], None),
        ("none", [{"label": 2}, {"label": 0}], [NO_LABEL, NO_LABEL], None),
    ],
)
def test_labels_in_json(
    tmp_path: Path, key: str, values: list[Any], labels: list[int], names: list[str] | None
) -> None:
    """The tars are packed, indexed, verified, and read by training."""
    hub_tar(tmp_path / "w" / "0.tar", *values)
    assert read(tmp_path / "w", label_key=key) == dict(enumerate(labels))
    assert inputs_of(tmp_path / "w", label_key=key).class_names == names
    manifest = surveyed(tmp_path / "w", key).manifest
    assert (manifest.class_names, manifest.label_key) == (names, key)
    assert defects(tmp_path / "w") == []
    shards = ShardSet.open(tmp_path / "w", manifest.num_classes)
    # Without its index, the tar is scanned for the key that the manifest names.
    (tmp_path / "w" / "0.index.npy").unlink()
    assert samples_of(ShardSet.open(tmp_path / "w", manifest.num_classes)) == samples_of(shards)
    assert samples_of(shards) == [(row, max(label, 0)) for row, label in enumerate(labels)]


def test_a_changed_label_in_json_is_found(tmp_path: Path) -> None:
    tar = hub_tar(tmp_path / "w" / "0.tar", {"label": 2}, {"label": 0})
    surveyed(tmp_path / "w", "json:label")
    tar.write_bytes(tar.read_bytes().replace(b'"label": 0', b'"label": 1'))
    assert any("of sample 1 it says" in line and "label 0, the tar" in line for line in defects(tmp_path / "w"))


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ({"class": 1}, "00001.json has the fields 'class', not 'label'; correct --label-key json:label"),
        ("[", r"00001.json is not JSON"),
        ("[3]", r"00001.json is '\[3\]', not 'label'"),
        ({"label": True}, "00001.json holds True as label, neither an integer nor a name"),
        ({"label": [1]}, r"00001.json holds \[1\] as label, neither"),
        ({"label": 1.5}, "00001.json holds 1.5 as label, neither"),
        ({"label": -1}, "label '-1'"),
        ({"label": None}, "has no label where a number is expected"),
    ],
)
def test_invalid_labels_in_json_are_refused(tmp_path: Path, value: Any, what: str) -> None:
    hub_tar(tmp_path / "w" / "0.tar", {"label": 2}, value, {"label": 1})
    refused(f"0.tar: byte \\d+: .*{what}", tmp_path / "w", label_key="json:label")
    (defect,) = surveyed(tmp_path / "w", "json:label").defects
    assert defect.byte is not None
    assert re.search(what, str(defect))
    assert not (tmp_path / "w" / "manifest.json").exists()


def test_packed_shards_take_no_label_key(tmp_path: Path) -> None:
    write_shards(numbered(2), [0, 1], tmp_path / "w")
    with pytest.raises(DataError, match="came from packing, which wrote cls; leave out --label-key"):
        surveyed(tmp_path / "w", "json:label")


def test_a_sample_without_json_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", ("k.jpg", numbered_png()), ("k.txt", b"x"))
    message = "a.tar: byte 0: sample 'k' has no k.json, and --label-key json:label needs it"
    refused(message, tmp_path / "a.tar", label_key="json:label")


def test_a_missing_key_is_requested_with_the_existing_fields(tmp_path: Path) -> None:
    tar = hub_tar(tmp_path / "w" / "0.tar", {"caption": "x", "label": 3}, {"caption": "y", "label": 1})
    message = "2 members .json; 00000.json has the fields 'caption', 'label'; pass --label-key json:label"
    refused(message, tar)
    finished = run_tool("index_shards", tmp_path / "w", "--workers", "1")
    assert finished.code == 2
    assert message in finished.err
    finished = run_tool("index_shards", tmp_path / "w", "--workers", "1", "--label-key", "json:label")
    assert finished.code == 0, finished.err
    assert Manifest.read(tmp_path / "w" / "manifest.json").class_counts == [0, 1, 0, 1]
    finished = run_tool("index_shards", tmp_path / "w", "--label-key", "cls")
    assert "its labels are those of json:label, not of cls; --force indexes again" in finished.err
    other = hub_tar(tmp_path / "b.tar", {"caption": "x"})
    assert inputs_of(other).notes == [
        f"{other}: 1 members .json, none .cls; --label-key json:KEY reads labels from a field of them"
    ]
    for key in ("json", "json:", "json:a..b", "txt"):
        with pytest.raises(DataError, match=f"--label-key {key}: is neither cls, json:FIELD nor none"):
            LabelKey.parse(key)


# Splits, and other files next to the tars


def timm(folder: Path, lengths: tuple[int, int] = (2, 1)) -> Path:
    for name, first in (("x-train-0000.tar", 0), ("x-train-0001.tar", 2), ("x-validation-00.tar", 3)):
        members = [{"label": 0}] * (2 if name == "x-train-0000.tar" else 1)
        hub_tar(folder / name, *members, first=first)
    train = {"name": "train", "filenames": ["x-train-0000.tar", "x-train-0001.tar"], "shard_lengths": list(lengths)}
    other = {"name": "validation", "filenames": ["x-validation-00.tar"], "shard_lengths": [1]}
    (folder / "_info.json").write_text(json.dumps({"splits": {"train": train, "validation": other}}))
    return folder


def test_the_counts_in_info_json_are_checked(tmp_path: Path) -> None:
    folder, key = timm(tmp_path / "w"), "json:label"
    refused(r"several splits \(x-train-0000.tar and x-validation-00.tar\); pass --split train", folder, label_key=key)
    assert sorted(read(folder, label_key=key, split="train")) == [0, 1, 2]
    assert sorted(read(folder, label_key=key, split="val")) == [3]
    whole = inputs_of(folder / "x-*.tar", label_key=key)
    what = "names the files of several splits (x-train-0000.tar and x-validation-00.tar), which become one set"
    assert whole.notes == [f"warning: {folder}/x-*.tar: {what}; pass --split train for one"]
    assert sorted(read(folder / "x-*.tar", label_key=key, split="train")) == [0, 1, 2]
    with pytest.raises(DataError, match=r"several splits .*; give those of one, for example '.*/\*train\*.tar'"):
        surveyed(folder, key)
    assert surveyed(folder / "*train*.tar", key).manifest.total == 3
    timm(folder, (2, 5))
    wrong = r"x-train-0001.tar: holds 1 samples, _info.json says 5; download the tars"
    refused(wrong, folder, label_key=key, split="train")
    (defect,) = surveyed(folder / "*train*.tar", key).defects
    assert "holds 1 samples, _info.json says 5" in str(defect)
    (folder / "x-train-0001.tar").unlink()
    missing = r"1 of the 2 tars that _info.json names are missing \(x-train-0001.tar, ...\)"
    refused(missing, folder, label_key=key, split="train")
    hub_tar(folder / "x-train-0001.tar", *[{"label": 0}] * 5)
    hub_tar(folder / "x-train-0002.tar", {"label": 0})
    refused("x-train-0002.tar: is not named by _info.json", folder, label_key=key, split="train")
    (folder / "_info.json").write_text('{"splits": 3}')
    refused("_info.json: is not as timm writes it", folder, label_key=key, split="train")


def test_files_that_describe_tars_are_ignored_and_reported(tmp_path: Path) -> None:
    hub_tar(tmp_path / "00000.tar", {"caption": "x"})
    for name in ("00000.parquet", "00000_stats.json", "README.md"):
        (tmp_path / name).write_bytes(b"x")
    inputs = inputs_of(tmp_path)
    assert len(inputs) == 1
    assert inputs.notes[0] == (
        f"{tmp_path}: 2 files such as 00000.parquet describe the tars, as in img2dataset, and are ignored"
    )
    assert inputs.ignored == {"json": 1, "md": 1}
    (tmp_path / "labels.csv").write_bytes(b"x")
    refused("labels.csv: lies among the images and seems to hold labels", tmp_path)
    with pytest.raises(DataError, match=r"labels.csv: seems to hold labels, and the tars next to it have no cls"):
        surveyed(tmp_path, "cls")
    assert surveyed(tmp_path, "none").manifest.num_classes == 0
    assert len(inputs_of(tmp_path, label_key="none")) == 1


# Tars of folders


def test_tars_of_folders_have_classes(tmp_path: Path) -> None:
    members = [("./data/cat/0.png", numbered_png(4, 0)), ("./data/dog/1.5.png", numbered_png(4, 1))]
    members += [("./data/.git/x.png", b""), ("./data/dog/README", b"")]
    tar = write_tar(tmp_path / "a.tar", *members)
    refused("sample .* an extension starts at the first dot of a name: write ./data/dog/1_5.png", tar)
    plain = write_tar(tmp_path / "b.tar", ("cat/0.png", numbered_png()), ("dog/0.png", numbered_png()))
    refused(r"2 images without classes: .* images lie in 2 folders \(cat, dog\); pass --labels folders to", plain)
    assert len(inputs_of(plain, labels="none")) == 2
    assert read(tar, labels="folders") == {0: 0, 1: 1}
    assert inputs_of(tar, labels="folders").class_names == ["cat", "dog"]
    splits = write_tar(tmp_path / "c.tar", ("train/cat/0.png", numbered_png()), ("val/cat/1.png", numbered_png()))
    refused("c.tar: train and val are parts of a data set.*; pass --split train", splits, labels="folders")
    assert read(splits, labels="folders", split="train") == {0: 0}
    refused("c.tar: train and val are parts of a data set.*; pass --split train", splits, labels="none")
    assert read(splits, labels="none", split="train") == {0: NO_LABEL}
