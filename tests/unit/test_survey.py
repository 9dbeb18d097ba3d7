"""The tools for shards that exist: indexing foreign tars, verifying, inspecting."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import webdataset
from PIL import Image

from jitscale.data.manifest import Manifest
from jitscale.data.packing import write_shards
from jitscale.data.shards import ShardSet

ROOT = Path(__file__).parents[2]


def run(tool: str, *arguments: str | Path, expect: int = 0) -> str:
    """What the tool prints; stderr too where it is expected to fail."""
    command = [sys.executable, f"tools/{tool}.py", *map(str, arguments)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == expect, finished.stdout + finished.stderr
    assert "Traceback" not in finished.stderr
    return finished.stdout + (finished.stderr if expect else "")


def numbered(count: int, size: int = 8) -> npt.NDArray[np.uint8]:
    numbers = np.arange(count, dtype=np.uint8)
    return np.tile(numbers[:, None, None, None] * 4, (1, size, size, 3))


def foreign(folder: Path, labels: list[str | None], size: int = 8, per_shard: int = 5) -> None:
    """Tars as webdataset's own writer leaves them; class names as text."""
    folder.mkdir()
    with webdataset.ShardWriter(str(folder / "theirs-%04d.tar"), maxcount=per_shard, verbose=0) as writer:
        for number, (image, label) in enumerate(zip(numbered(len(labels), size), labels, strict=True)):
            sample = {"__key__": f"n{number:04d}", "png": image, "json": {"a": 1}}
            writer.write(sample | ({} if label is None else {"cls": label.encode()}))


def samples(shards: ShardSet) -> list[tuple[int, int]]:
    where = [shards.shard_and_index(sample) for sample in range(shards.num_samples)]
    return [(int(image[0, 0, 0]) // 4, label) for image, label in (shards.read(*place) for place in where)]


@pytest.mark.parametrize(
    ("labels", "names", "classes", "expected"),
    [
        (["3", "1", "0"] * 4, None, 4, [3, 1, 0] * 4),
        (["cat", "ant", "dog"] * 4, ["ant", "cat", "dog"], 3, [1, 0, 2] * 4),
        ([None] * 12, None, 0, [0] * 12),
    ],
)
def test_foreign_tars_become_shards(
    tmp_path: Path, labels: list[str | None], names: list[str] | None, classes: int, expected: list[int]
) -> None:
    folder = tmp_path / "tars"
    foreign(folder, labels)
    said = run("index_shards", folder, "--workers", "2")
    assert "indexed 3 shards with 12 images of 8 x 8 pixels" in said
    manifest = Manifest.read(folder / "manifest.json")
    assert (manifest.codec, manifest.resolution, manifest.num_classes, manifest.class_names, manifest.total) == (
        "foreign",
        8,
        classes,
        names,
        12,
    )
    shards = ShardSet.open(folder, classes, 8)
    assert samples(shards) == list(enumerate(expected))
    assert "is indexed already" in run("index_shards", folder)
    run("index_shards", folder, "--force")
    assert ShardSet.open(folder, classes, 8).manifest_hash == shards.manifest_hash
    assert ", 0 defects" in run("index_shards", folder, "--verify")


def test_given_names_fix_the_order(tmp_path: Path) -> None:
    foreign(tmp_path / "tars", ["cat", "ant"] * 3)
    (tmp_path / "names.txt").write_text("dog\ncat\nant\n")
    run("index_shards", tmp_path / "tars", "--class-names", tmp_path / "names.txt")
    assert [label for _, label in samples(ShardSet.open(tmp_path / "tars", 3, 8))] == [1, 2] * 3
    (tmp_path / "names.txt").write_text("cat\n")
    said = run("index_shards", tmp_path / "tars", "--force", "--class-names", tmp_path / "names.txt", expect=2)
    assert said.count("has label 'ant', none of the 1 classes") == 3


def test_originals_of_mixed_sizes_may_be_enlarged(tmp_path: Path) -> None:
    folder = tmp_path / "tars"
    foreign(folder, ["0"] * 3, size=8)
    with webdataset.ShardWriter(str(folder / "more-%04d.tar"), verbose=0) as writer:
        writer.write({"__key__": "m", "png": numbered(1, 20)[0], "cls": b"0"})
    assert "of their own sizes" in run("index_shards", folder)
    assert Manifest.read(folder / "manifest.json").resolution is None
    assert ShardSet.open(folder, 1, 16).read(1, 0)[0].shape == (16, 16, 3)


def test_all_defects_are_listed_and_nothing_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "tars"
    foreign(folder, ["1", "2", "cat", "3", None, "-1", "4", "5"], per_shard=4)
    cut = folder / "theirs-0009.tar"
    cut.write_bytes((folder / "theirs-0000.tar").read_bytes()[:3000])
    said = run("index_shards", folder, expect=2)
    for what in (
        r"theirs-0000.tar: byte",
        "sample 2 has label 'cat', most samples have a number",
        "sample 0 has no label, most samples have a number",
        "sample 1 has label '-1', a number outside",
        "theirs-0009.tar:",
        "4 defects in 3 of 3 tars; nothing was written",
    ):
        assert what in said, said
    assert not list(folder.glob("*.json")) + list(folder.glob("*.npy"))


def test_verify_finds_every_defect(tmp_path: Path) -> None:
    """Several in several shards, each with its shard and byte; the report has all of them."""
    folder = tmp_path / "shards"
    write_shards(numbered(40), np.arange(40) % 10, folder, codec="raw", samples_per_shard=5)
    assert ", 0 defects" in run("index_shards", folder, "--verify", "--workers", "2")
    tars = sorted(folder.glob("*.tar"))
    index = [np.load(tar.with_suffix(".index.npy")) for tar in tars]

    def overwrite(shard: int, offset: int, data: bytes) -> None:
        with tars[shard].open("r+b") as file:
            file.seek(offset)
            file.write(data)

    overwrite(0, int(index[0]["offset"][2]) + 150, b"\x07")  # a pixel
    overwrite(1, int(index[1]["offset"][3]), b"broken")  # an image's header
    tars[2].write_bytes(tars[2].read_bytes()[:2000])
    changed = index[3].copy()
    changed["label"][1] += 1
    np.save(tars[3].with_suffix(".index.npy"), changed)
    tars[4].unlink()
    tars[5].with_suffix(".index.npy").unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][6]["samples"] = 4
    manifest["shards"][7]["samples"] = 6
    (folder / "manifest.json").write_text(json.dumps(manifest))
    run("index_shards", folder, "--verify", "--report", tmp_path / "report.jsonl", expect=2)
    report = [json.loads(line) for line in (tmp_path / "report.jsonl").read_text().splitlines()]
    found = {(Path(entry["shard"]).name, entry["byte"], entry["what"].split(";")[0]) for entry in report}

    def has(shard: int, byte: int | None, what: str) -> bool:
        return any(n == tars[shard].name and b == byte and what in w for n, b, w in found)

    assert has(0, None, "has sha256"), found
    assert has(1, None, "has sha256"), found
    assert has(1, int(index[1]["offset"][3]), "sample 3 cannot be decoded as npy"), found
    assert has(2, None, "has 2000 bytes, the manifest says"), found
    assert has(3, int(index[3]["offset"][1]), "1 samples differ from shard-000003.index.npy"), found
    assert has(4, None, "is missing"), found
    assert has(5, None, "has no index beside it"), found
    assert has(6, None, "holds 5 samples, the manifest says 4"), found
    assert has(7, None, "holds 5 samples, the manifest says 6"), found
    assert [entry["shard"] for entry in report] == sorted(entry["shard"] for entry in report)


def test_inspection_agrees_with_numpy(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 12, 12, 3), np.uint8)
    images[:15] = images[:15, ..., :1]  # a quarter is grey
    labels = np.array([0] * 30 + [1] * 20 + [3] * 10)
    folder = tmp_path / "shards"
    names = ["ant", "bee", "cat", "dog"]
    write_shards(images, labels, folder, codec="png", samples_per_shard=25, class_names=names)
    sheet = tmp_path / "sheet.png"
    said = run("inspect_shards", folder, "--json", "--contact-sheet", sheet, "--workers", "2")
    result: dict[str, Any] = json.loads(said)
    assert (result["shards"], result["samples"], result["decoded"]) == (3, 60, 60)
    assert result["manifest_hash"] == ShardSet.open(folder, 4).manifest_hash
    assert result["extensions"] == {"png": 60}
    assert (result["classes"]["number"], result["classes"]["empty"]) == (4, ["2 cat"])
    assert result["classes"]["largest"]["samples"] == 30
    assert result["share_grey"] == pytest.approx(0.25)
    assert result["rgb_mean_255"] == pytest.approx(images.mean(axis=(0, 1, 2)).tolist(), rel=1e-6)
    assert result["rgb_std_255"] == pytest.approx(images.astype(float).std(axis=(0, 1, 2)).tolist(), rel=1e-6)
    assert result["rgb_mean"] == pytest.approx((images.mean(axis=(0, 1, 2)) / 127.5 - 1).tolist(), abs=1e-6)
    with Image.open(sheet) as picture:
        assert min(picture.size) > 8 * 80
    assert sheet.stat().st_size < 1_000_000
    table = run("inspect_shards", folder)
    assert "| classes without a sample | 1 (2 cat) |" in table
    assert "| short side below 256 | 100.0% |" in table


def test_tars_without_a_manifest_are_inspected_as_they_are(tmp_path: Path) -> None:
    foreign(tmp_path / "tars", ["cat", "ant", "ant"])
    with tarfile.open(tmp_path / "tars" / "z.tar", "w") as archive:
        info = tarfile.TarInfo("k.jpg")
        info.size = 5
        archive.addfile(info, io.BytesIO(b"wrong"))
    result = json.loads(run("inspect_shards", tmp_path / "tars", "--json"))
    assert (result["samples"], result["codec"], result["decoded"]) == (4, None, 3)
    assert len(result["undecodable"]) == 1


@pytest.mark.parametrize("tool", ["index_shards", "inspect_shards"])
def test_mistakes_are_one_line(tmp_path: Path, tool: str) -> None:
    for argument, message in (
        (tmp_path / "nowhere", "there is no such file or folder"),
        (tmp_path, "no tars here"),
        ("pipe:cat x.tar", "only local folders"),
        ("s3://bucket/folder", "only local folders"),
    ):
        said = run(tool, argument, expect=2)
        assert said.startswith("error: "), said
        assert message in said
        assert said.count("\n") == 1
