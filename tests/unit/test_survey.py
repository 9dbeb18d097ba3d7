"""Tools about shards that exist: indexing foreign tars, verifying, inspecting."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import webdataset
from PIL import Image

from jitscale.data.find import find_tars
from jitscale.data.images import encode
from jitscale.data.inspection import (
    CAPTION,
    SHEET_TILES,
    TILE,
    balance,
    collect,
    contact_sheet,
    extensions,
    look,
    random_positions,
    statistics,
)
from jitscale.data.manifest import BadInput, Manifest, read_class_names
from jitscale.data.packing import write_shards
from jitscale.data.shards import ShardSet
from jitscale.data.survey import Survey, in_processes, survey
from jitscale.data.tar_index import index_tar, scan_tar, write_index
from jitscale.data.verification import verify
from jitscale.errors import DataError
from tests.unit.test_shards import all_samples, number_of, numbered, png, tar

ROOT = Path(__file__).parents[2]
NAMES = ["cat", "dog", "bee"]


def theirs(folder: Path, label: Callable[[int], dict[str, Any]], count: int = 10, size: int = 8) -> Path:
    """Tars of 4 samples that webdataset wrote."""
    folder.mkdir(exist_ok=True)
    with webdataset.ShardWriter(str(folder / "theirs-%03d.tar"), maxcount=4, verbose=0) as writer:
        for number, image in enumerate(numbered(count, size)):
            writer.write({"__key__": f"n{number:04d}", "png": image, **label(number)})
    return folder


def index(folder: Path | str, class_names: list[str] | None = None, workers: int = 1) -> Survey:
    found = survey(find_tars(str(folder)), class_names, workers)
    if not found.defects:
        found.write()
    return found


def defects(folder: Path | str, workers: int = 1) -> list[str]:
    return [str(defect) for defect in verify(find_tars(str(folder)), workers).defects]


def tool(name: str, *arguments: str | Path, expect: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"tools/{name}.py", *map(str, arguments)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == expect, finished.stdout + finished.stderr
    return finished


# Indexing


def test_tars_with_numbers_become_shards(tmp_path: Path) -> None:
    theirs(tmp_path, lambda number: {"cls": number % 3})
    before = all_samples(ShardSet.open(tmp_path, 3))
    manifest = index(tmp_path).manifest
    assert (manifest.codec, manifest.resolution, manifest.num_classes, manifest.class_names) == ("foreign", 8, 3, None)
    assert [record.samples for record in manifest.shards] == [4, 4, 2]
    shards = ShardSet.open(tmp_path, 3, 8)
    assert all_samples(shards) == before == [(number, number % 3) for number in range(10)]
    for path in tmp_path.glob("*.tar"):
        np.testing.assert_array_equal(np.load(path.with_suffix(".index.npy")), index_tar(path))
    assert defects(tmp_path) == []
    written = (tmp_path / "manifest.json").read_bytes()
    index(tmp_path, workers=2)
    assert (tmp_path / "manifest.json").read_bytes() == written
    assert ShardSet.open(tmp_path, 3).manifest_hash == shards.manifest_hash


@pytest.mark.parametrize("given", [None, NAMES])
def test_names_are_numbered_sorted_or_as_told(tmp_path: Path, given: list[str] | None) -> None:
    """The second shard holds one class only, and the first meets them in another order than the sorted one."""
    theirs(tmp_path, lambda number: {"cls": NAMES[number % 3 if number < 4 else 1]})
    manifest = index(tmp_path, given).manifest
    expected = given or sorted(NAMES)
    assert manifest.class_names == expected
    assert manifest.num_classes == 3
    samples = [(number, expected.index(NAMES[number % 3 if number < 4 else 1])) for number in range(10)]
    assert all_samples(ShardSet.open(tmp_path, 3)) == samples
    assert defects(tmp_path) == []


def test_tars_without_labels_become_unlabelled_shards(tmp_path: Path) -> None:
    theirs(tmp_path, lambda number: {"txt": f"image {number}"})
    manifest = index(tmp_path).manifest
    assert (manifest.num_classes, manifest.class_names) == (0, None)
    assert all_samples(ShardSet.open(tmp_path, 0)) == [(number, 0) for number in range(10)]
    assert defects(tmp_path) == []
    with pytest.raises(DataError, match="the manifest says that there are no labels"):
        ShardSet.open(tmp_path, 3)


def test_a_file_of_names_bounds_numbers(tmp_path: Path) -> None:
    theirs(tmp_path, lambda number: {"cls": number % 4})
    assert index(tmp_path, ["a", "b", "c", "d", "e"]).manifest.num_classes == 5
    (tmp_path / "manifest.json").unlink()
    found = [str(defect) for defect in index(tmp_path, NAMES).defects]
    assert [re.sub(r"byte \d+", "byte N", line.removeprefix(f"{tmp_path}/")) for line in found] == [
        f"theirs-00{shard}.tar: byte N: sample 3 has label 3, none of the 3 classes; correct it or their file"
        for shard in range(2)
    ]


def test_a_glob_may_leave_tars_out(tmp_path: Path) -> None:
    theirs(tmp_path, lambda number: {"cls": 0})
    assert [record.name for record in index(tmp_path / "theirs-00[12].tar").manifest.shards] == [
        "theirs-001.tar",
        "theirs-002.tar",
    ]
    assert ShardSet.open(tmp_path, 1).num_samples == 6
    assert not (tmp_path / "theirs-000.index.npy").exists()


def offset(path: Path, row: int) -> int:
    return int(index_tar(path, with_labels=False)[row]["offset"])


def test_every_defect_is_reported_and_nothing_written(tmp_path: Path) -> None:
    """Kinds of labels in a mixture, and damaged tars between sound ones."""
    image = png()
    paths = {
        "a": tar(
            tmp_path / "a.tar", ("a.png", image), ("a.cls", b"1"), ("b.png", image), ("c.png", image), ("c.cls", b"cat")
        ),
        "b": tar(tmp_path / "b.tar", ("a.png", image), ("a.cls", b"-1"), ("b.png", image), ("b.cls", b"")),
        "c": tar(
            tmp_path / "c.tar",
            *[(f"{number}.{part}", data) for number in range(9) for part, data in (("png", image), ("cls", b"2"))],
        ),
        "d": tar(
            tmp_path / "d.tar",
            ("a.txt", b""),
            ("b.png", image),
            ("b.cls", b"\xff"),
            ("b.png", image),
            ("b.cls", b"4"),
            ("c.png", image),
            ("c.cls", b"3"),
        ),
    }
    (tmp_path / "e.tar").write_bytes(paths["a"].read_bytes()[: offset(paths["a"], 2) + 10])
    (tmp_path / "f.tar").write_bytes(b"")
    block = 512 + 512 * -(-len(image) // 512)  # of an image
    before = sorted(os.listdir(tmp_path))
    found = index(tmp_path, workers=2)
    assert sorted(os.listdir(tmp_path)) == before
    expected = [
        f"a.tar: byte {offset(paths['a'], 1)}: sample 1 has no label where a number is expected; make",
        f"a.tar: byte {offset(paths['a'], 2)}: sample 2 has label 'cat' where a number is expected; make",
        "b.tar: byte 512: sample 0 has label '-1', a number outside 0..2147483647; write",
        f"b.tar: byte {512 + block + 1024}: sample 1 has label '', nothing; write",
        "d.tar: byte 0: sample 'a' has 0 images among ['txt'], needs",
        "d.tar: byte 1024: sample 0 has label '\ufffd', not printable UTF-8",
        f"d.tar: byte {512 + block + 1024}: key 'b' comes twice",
        f"e.tar: byte {offset(paths['a'], 1)}: sample 1 has no label where a number is expected; make",
        f"e.tar: byte {offset(paths['a'], 2) - 512}: is no whole tar (unexpected end of data; it ends at byte",
        "f.tar: is empty (0 bytes); copy or write it again",
    ]
    for line, start in zip(map(str, found.defects), expected, strict=True):
        assert line.startswith(f"{tmp_path}/{start}"), line
        assert "\n" not in line


def test_names_and_numbers_in_equal_parts_are_still_refused(tmp_path: Path) -> None:
    theirs(tmp_path, lambda number: {"cls": number if number % 2 else "cat"}, count=4)
    assert [defect.what.split(";")[0] for defect in index(tmp_path).defects] == [
        f"sample {row} has label 'cat' where a number is expected" for row in (0, 2)
    ]


def test_the_resolution_is_that_of_all_images(tmp_path: Path) -> None:
    """Headers alone are read, even when they are far inside a file, and an undecodable image does not decide."""
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(noise).save(stream, "JPEG", icc_profile=bytes(200_000))
    square = [("a.jpg", stream.getvalue()), ("b.npy", encode(noise, "raw")[1]), ("c.webp", encode(noise, "webp")[1])]
    tar(tmp_path / "a.tar", *square)
    tar(tmp_path / "b.tar", ("a.png", b"no image"))
    found = index(tmp_path)
    assert (found.manifest.resolution, found.undecodable) == (16, 1)
    for name, image in (("other", png(8)), ("oblong", encode(noise[:8], "png")[1])):
        (tmp_path / name).mkdir()
        tar(tmp_path / name / "a.tar", *square, ("d.png", image))
        assert index(tmp_path / name).manifest.resolution is None
    (tmp_path / "all_oblong").mkdir()
    tar(tmp_path / "all_oblong" / "a.tar", ("d.png", image))
    assert index(tmp_path / "all_oblong").manifest.resolution is None


def test_indexing_again_keeps_the_manifest_of_a_packing(tmp_path: Path) -> None:
    labels = [number % 2 for number in range(10)]
    write_shards(numbered(10), labels, tmp_path, samples_per_shard=4, class_names=["x", "y"])
    manifest, beside = (tmp_path / "manifest.json").read_bytes(), tmp_path / "shard-000001.index.npy"
    content = beside.read_bytes()
    beside.unlink()
    assert defects(tmp_path) == [
        f"{tmp_path}/shard-000001.tar: has no index beside it; rebuild it with tools/index_shards.py --force"
    ]
    index(tmp_path)
    assert (tmp_path / "manifest.json").read_bytes() == manifest
    assert beside.read_bytes() == content
    with pytest.raises(DataError, match="came from packing, which named the classes; leave out"):
        index(tmp_path, ["x", "y"])
    flip(tmp_path / "shard-000001.tar", offset(tmp_path / "shard-000001.tar", 0) + 70)
    assert [str(defect) for defect in index(tmp_path).defects] == [
        f"{tmp_path}/shard-000001.tar: is not the shard that the manifest names; copy it again"
    ]


def test_a_kill_while_indexing_again_leaves_no_manifest_of_other_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Indexes are written first: under the old manifest their labels would mean something else."""
    index(theirs(tmp_path / "t", lambda number: {"cls": ["cat", "dog"][number % 2]}), ["cat", "dog"])

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("jitscale.data.survey.write_index", killed)
    with pytest.raises(KeyboardInterrupt):
        index(tmp_path / "t", ["dog", "cat"])
    assert not (tmp_path / "t/manifest.json").exists()
    monkeypatch.undo()
    index(tmp_path / "t", ["dog", "cat"])
    assert ShardSet.open(tmp_path / "t", 2, 8).read(0, 0)[1] == 1


def test_ctrl_c_and_other_ranks(tmp_path: Path) -> None:
    """A tool says that it was stopped, and says its mistakes under Slurm too, whichever task it is."""
    for name in ("index_shards", "inspect_shards"):
        finished = subprocess.run(
            [sys.executable, f"tools/{name}.py", "absent"],
            cwd=ROOT,
            env={**os.environ, "SLURM_PROCID": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert finished.returncode == 2
        assert "absent" in finished.stderr
    code = "from jitscale.errors import exit_with_message\ndef main(): raise KeyboardInterrupt\nexit_with_message(main)"
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stderr) == (130, "stopped by Ctrl-C\n")


def test_files_of_class_names(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_text("tench\r\ngreat white shark\n2\n\n")
    assert read_class_names(path) == ["tench", "great white shark", "2"]
    for text, message in [
        ("a\n\nb", "line 2: is empty"),
        ("a\nb\na", "line 3: 'a' stands in line 1 too"),
        ("a\n0", "line 2: calls class 1 '0', the number of another"),
    ]:
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            read_class_names(path)
    with pytest.raises(DataError, match="cannot be read as class names"):
        read_class_names(tmp_path / "nowhere")


def test_a_dead_process_is_one_line() -> None:
    with pytest.raises(DataError, match="one of 2 worker processes died"):
        list(in_processes(os._exit, [3, 4], 2))


# Verifying


@pytest.mark.parametrize("codec", ["raw", "png", "jpeg"])
def test_sound_shards_have_no_defects(tmp_path: Path, codec: str) -> None:
    write_shards(numbered(20), [number % 3 for number in range(20)], tmp_path, codec=codec, samples_per_shard=8)
    result = verify(find_tars(str(tmp_path)), 2)
    assert result.defects == []
    assert (result.shards, result.samples) == (3, 20)
    assert result.bytes == sum(path.stat().st_size for path in tmp_path.glob("*.tar"))


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0xFF
    path.write_bytes(data)


def change_manifest(folder: Path, **values: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def vouch(folder: Path) -> None:
    """Make the manifest vouch for the tars as they are, with fresh indices."""
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").unlink()
    fresh = index(folder).manifest
    shards = [{"name": s.name, "samples": s.samples, "bytes": s.bytes, "sha256": s.sha256} for s in fresh.shards]
    (folder / "manifest.json").write_text(json.dumps({**manifest, "shards": shards, "total": fresh.total}))


def test_damage_of_every_kind_is_found_in_one_run(tmp_path: Path) -> None:
    """One kind a shard, all in one folder: none hides another."""
    images = np.random.default_rng(0).integers(0, 256, (36, 16, 16, 3), np.uint8)
    write_shards(images, [number % 3 for number in range(36)], tmp_path, codec="jpeg", samples_per_shard=4)
    paths = sorted(tmp_path.glob("*.tar"))
    rows = [index_tar(path) for path in paths]
    # 0: a broken image and a label out of range, in a shard that the manifest vouches for
    image_at = int(rows[0]["offset"][2])
    data = bytearray(paths[0].read_bytes())
    data[image_at + 200 : image_at + 300] = bytes(100)
    data[scan_tar(paths[0])[1].label_offset] = ord("7")
    paths[0].write_bytes(data)
    vouch(tmp_path)
    # 1: another byte, but the same pixels; 2: cut inside the third sample; 3: gone
    flip(paths[1], int(rows[1]["offset"][1]) + 14)  # the density in the JFIF header
    cut = int(rows[2]["offset"][2]) + 20
    paths[2].write_bytes(paths[2].read_bytes()[:cut])
    paths[3].unlink()
    # 4: an index that lies about a label, 5: about the number of samples, 6: is no index, 7: is not there
    lying = index_tar(paths[4])
    lying["label"][3] = (lying["label"][3] + 1) % 3
    write_index(paths[4], lying)
    write_index(paths[5], index_tar(paths[5])[:3])
    paths[6].with_suffix(".index.npy").write_bytes(b"nothing")
    paths[7].with_suffix(".index.npy").unlink()
    # 8: a manifest that lies about the number of samples
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["shards"][8]["samples"] = 5
    change_manifest(tmp_path, shards=manifest["shards"], total=37)

    def sample(shard: int, row: int) -> int:
        return int(rows[shard]["offset"][row])

    size = manifest["shards"][2]["bytes"]
    lies = r"shard-000004.index.npy differs in 1 of 4 samples: of sample 3 it says .*, the tar .* --force"
    expected = [
        (0, sample(0, 1), "has label '7', needs one in 0..2; write the shard again"),
        (0, sample(0, 2), "sample 2 cannot be decoded as jpg (.*); write the shard again without it, or leave it"),
        (1, None, "has sha256 .*, the manifest says .*; copy it again"),
        (2, None, f"has {cut} bytes, the manifest says {size}; copy it again"),
        (2, sample(2, 2) - 512, rf"is no whole tar \(unexpected end of data; it ends at byte {cut}, .*; copy"),
        (3, None, "is missing; copy it again"),
        (4, sample(4, 3), lies),
        (5, None, "holds 4 samples, shard-000005.index.npy lists 3; rebuild"),
        (6, None, "has an index that cannot be mapped .*; remove it"),
        (7, None, "has no index beside it; rebuild"),
        (8, None, "holds 4 samples, the manifest says 5; write the manifest again"),
    ]
    found = verify(find_tars(str(tmp_path)), 2)
    assert [(defect.path, defect.byte) for defect in found.defects] == [
        (paths[shard], byte) for shard, byte, _ in expected
    ]
    for defect, (_, _, message) in zip(found.defects, expected, strict=True):
        assert re.search(message, str(defect)), str(defect)
        assert "\n" not in str(defect)
    assert defects(paths[8]) == [str(found.defects[-1])]  # the tars that were named, not those that the manifest names
    assert found.shards == 9
    assert found.samples == 4 * 7 + 2

    report = tmp_path / "report.jsonl"
    done = tool("index_shards", tmp_path, "--verify", "--report", report, expect=2)
    assert [json.loads(line) for line in report.read_text().splitlines()] == [
        {"shard": str(defect.path), "byte": defect.byte, "what": defect.what} for defect in found.defects
    ]
    *lines, closing = done.stdout.splitlines()
    assert lines == [str(defect) for defect in found.defects]
    assert re.fullmatch(rf"{tmp_path}: 9 shards, 30 samples, [\d,]+ bytes, \d+ images/s, 11 defects", closing)


def test_a_byte_of_raw_pixels_is_seen_by_its_hash(tmp_path: Path) -> None:
    write_shards(numbered(8), [0] * 8, tmp_path, codec="raw", samples_per_shard=4)
    path = tmp_path / "shard-000001.tar"
    flip(path, offset(path, 2) + 200)
    ShardSet.open(tmp_path, 1)
    (line,) = defects(tmp_path)
    assert re.fullmatch(rf"{path}: has sha256 \w+\.\.\., the manifest says \w+\.\.\.; copy it again", line)


def test_a_wrong_label_is_not_the_fault_of_the_index(tmp_path: Path) -> None:
    write_shards(numbered(4), [0] * 4, tmp_path)
    path = tmp_path / "shard-000000.tar"
    flip(path, scan_tar(path)[3].label_offset)
    digest, label = defects(tmp_path)
    assert "has sha256" in digest
    assert label.startswith(f"{path}: byte {offset(path, 3)}: sample 3 has label '\ufffd', needs one in 0..0")


def test_what_the_manifest_says_of_the_images_is_checked(tmp_path: Path) -> None:
    write_shards(numbered(3), [0, 1, 1], tmp_path, class_names=["a", "b"])
    change_manifest(tmp_path, resolution=9, num_classes=1)
    manifest, *lines = defects(tmp_path)
    assert manifest == f"{tmp_path}/manifest.json: names 2 classes and counts 1; write it again"
    assert len(lines) == 5
    assert sum("is 8 x 8 pixels, the manifest says 9 a side" in line for line in lines) == 3
    assert sum("has label '1', needs one in 0..0" in line for line in lines) == 2
    tar(tmp_path / "more.tar", ("a.png", png()))
    assert f"{tmp_path}/more.tar: is not named by manifest.json; choose another pattern or index the folder again" in (
        defects(tmp_path / "*.tar")
    )


def test_a_folder_without_manifest_cannot_be_verified(tmp_path: Path) -> None:
    theirs(tmp_path, lambda number: {})
    with pytest.raises(DataError, match=r"has no manifest.json to compare .*; make one with tools/index_shards.py"):
        defects(tmp_path)


# Inspecting


def photographs() -> list[npt.NDArray[np.uint8]]:
    random = np.random.default_rng(1)
    shapes = [(300, 400), (200, 600), (512, 512), (100, 90)]
    images = [
        random.integers(low, 256, (*shape, 3), np.uint8) for low, shape in zip((0, 50, 100, 0), shapes, strict=True)
    ]
    return [*images[:3], np.repeat(images[3][..., :1], 3, axis=-1)]


def test_statistics_are_those_of_numpy(tmp_path: Path) -> None:
    images = photographs()
    tar(tmp_path / "a.tar", *[(f"{number}.npy", encode(image, "raw")[1]) for number, image in enumerate(images)])
    tar(tmp_path / "b.tar", ("a.png", b"no image"), ("b.png", png(8, 3)))
    for workers in (1, 2):
        seen = look(collect(find_tars(str(tmp_path)), 1), 100, 0, workers)
        assert [str(defect).split("cannot")[0] for defect in seen.undecodable] == [f"{tmp_path}/b.tar: byte 512: "]
        found = statistics(seen)
        every = [*images, numbered(4)[3]]
        assert found["width"] == {"min": 8, "median": 400, "max": 600}
        assert found["height"] == {"min": 8, "median": 200, "max": 512}
        assert found["share_of_short_sides_below"] == {"256": 3 / 5, "512": 4 / 5}
        assert found["share_grey"] == 1 / 5
        # Enlarging every image to one size by repetition would weigh them equally: so do means of means.
        pixels = [image.reshape(-1, 3).astype(np.float64) for image in every]
        mean = np.mean([image.mean(0) for image in pixels], axis=0)
        deviation = np.sqrt(np.mean([((image - mean) ** 2).mean(0) for image in pixels], axis=0))
        np.testing.assert_allclose(found["rgb_mean_255"], mean)
        np.testing.assert_allclose(found["rgb_std_255"], deviation)
        np.testing.assert_allclose(found["rgb_mean"], mean / 127.5 - 1)
        np.testing.assert_allclose(found["rgb_std"], deviation / 127.5)


def test_counts_and_balance(tmp_path: Path) -> None:
    labels = [0] * 5 + [1] * 2 + [3] * 4
    manifest = write_shards(numbered(11), labels, tmp_path, samples_per_shard=4, class_names=["a", "b", "c", "d"])
    for damage in ("", "index", "manifest"):
        if damage == "index":
            (tmp_path / "shard-000001.index.npy").unlink()
        if damage == "manifest":
            (tmp_path / "manifest.json").unlink()
        collection = collect(find_tars(str(tmp_path)), 1)
        named = damage != "manifest"
        assert (len(collection.paths), collection.samples) == (3, 11)
        assert collection.bytes == sum(record.bytes for record in manifest.shards)
        assert (collection.codec, collection.resolution) == (("png", 8) if named else (None, None))
        assert collection.manifest_hash == ShardSet.open(tmp_path, 4).manifest_hash
        assert extensions(collection) == {"png": 11}
        assert balance(collection) == {
            "number": 4,
            "samples_without_label": 0,
            "smallest": {"class": "2 c" if named else "2", "samples": 0},
            "median_samples": 3.0,
            "largest": {"class": "0 a" if named else "0", "samples": 5},
            "empty": ["2 c" if named else "2"],
        }


def test_the_last_class_may_be_empty(tmp_path: Path) -> None:
    write_shards(numbered(1), [0], tmp_path, class_names=["a", "b", "c"])
    found = balance(collect(find_tars(str(tmp_path)), 1))
    assert (found["median_samples"], found["empty"]) == (0.0, ["1 b", "2 c"])


def test_the_random_sample_is_spread_and_seeded() -> None:
    for total, count in [(10, 3), (1000, 64), (100_000_000, 2000), (7, 7), (5, 9)]:
        samples = random_positions(total, count, seed=1)
        parts = min(total, count)
        assert len(samples) == parts
        assert all(part * total // parts <= sample < (part + 1) * total // parts for part, sample in enumerate(samples))
    assert (
        random_positions(1000, 10, 1).tolist()
        == random_positions(1000, 10, 1).tolist()
        != random_positions(1000, 10, 2).tolist()
    )
    means = [random_positions(1000, 10, seed).mean() for seed in range(200)]
    assert np.mean(means) == pytest.approx(499.5, abs=5)
    assert len(random_positions(0, 5, 0)) == 0


def tiles_of(sheet: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.uint8]]:
    wide, high = sheet.shape[1] // SHEET_TILES, sheet.shape[0] // SHEET_TILES
    corners = [(4 + row * high, 4 + column * wide) for row in range(SHEET_TILES) for column in range(SHEET_TILES)]
    return [sheet[top : top + TILE, left : left + TILE] for top, left in corners]


@pytest.mark.parametrize("classes", [3, 200])
def test_the_contact_sheet_shows_every_kth_class(tmp_path: Path, classes: int) -> None:
    """The images say their number, from which the class follows."""
    count = 400
    write_shards(
        numbered(count), [number % classes for number in range(count)], tmp_path, codec="raw", samples_per_shard=90
    )
    path = tmp_path / "sheets" / "sheet.png"
    contact_sheet(collect(find_tars(str(tmp_path)), 1), path, seed=0)
    assert path.stat().st_size < 1_000_000
    with Image.open(path) as sheet:
        assert sheet.size == (8 * (TILE + 4) + 4, 8 * (TILE + CAPTION + 4) + 4)
        tiles = tiles_of(np.asarray(sheet.convert("RGB")))
    assert all((tile == tile[:1, :1]).all() for tile in tiles)
    numbers = [number_of(tile) for tile in tiles]
    assert [number % classes for number in numbers] == [tile * classes // 64 for tile in range(64)]
    assert len(set(numbers)) == 64


def test_a_contact_sheet_of_noise_stays_small(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, TILE, TILE, 3), np.uint8)
    parts = [(f"{number:02d}.npy", encode(image, "raw")[1]) for number, image in enumerate(noise)]
    tar(tmp_path / "a.tar", *parts[:-1], ("z.png", b"no image"))
    contact_sheet(collect(find_tars(str(tmp_path)), 1), tmp_path / "sheet.png", seed=0)
    assert (tmp_path / "sheet.png").stat().st_size < 1_000_000
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert np.ptp(tiles_of(np.asarray(sheet.convert("RGB")))[63].reshape(-1, 3), axis=0).max() == 0  # grey


def test_damage_is_counted_and_does_not_end_an_inspection(tmp_path: Path) -> None:
    write_shards(numbered(12), [0] * 12, tmp_path, codec="png", samples_per_shard=4)
    (tmp_path / "shard-000000.tar").unlink()
    lying = index_tar(tmp_path / "shard-000001.tar")
    lying["offset"][0] = -5
    lying["extension"][1] = b"\xff"
    write_index(tmp_path / "shard-000001.tar", lying)
    (tmp_path / "shard-000002.index.npy").write_bytes(b"")
    change_manifest(tmp_path, bad=[{"source": "x.jpg", "reason": "broken"}])
    collection = collect(find_tars(str(tmp_path)), 1)
    assert collection.samples == 8
    assert len(collection.defects) == 2
    assert collection.bad == [BadInput("x.jpg", "broken")]
    seen = look(collection, 100, 0, 1)
    assert (seen.images, len(seen.undecodable)) == (6, 2)
    contact_sheet(collection, tmp_path / "sheet.png", 0)


# The command line


def test_the_tools_from_the_command_line(tmp_path: Path) -> None:
    """Index, be told that it is done, verify, inspect: with names, in several processes."""
    theirs(tmp_path, lambda number: {"cls": NAMES[number % 3]})
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    done = tool("index_shards", tmp_path, "--class-names", tmp_path / "names.txt", "--workers", "2")
    assert done.stdout == f"{tmp_path}: indexed 3 shards with 10 images of 8 x 8 pixels, 3 classes\n"
    assert "scan: 100%" in done.stderr
    done = tool("index_shards", tmp_path)
    assert done.stdout == f"{tmp_path}: is indexed already, 3 shards with 10 images\n"
    assert tool("index_shards", tmp_path, "--verify").stdout.endswith(" 0 defects\n")
    tar(tmp_path / "more.tar", ("a.png", png()))
    refused = tool("index_shards", tmp_path, expect=2)
    assert re.search(r"manifest.json: is there, but 1 tars .* \(more.tar, ...\); look with --verify", refused.stderr)
    assert "manifest.json does not name them: 1 tar of the folder" in tool("index_shards", tmp_path, "--verify").stdout
    refused = tool("index_shards", tmp_path, "--force", expect=2)
    *_, defect, error = refused.stderr.splitlines()
    assert defect.startswith(
        f"{tmp_path}/more.tar: byte 512: sample 0 has no label where a class name is expected; make"
    )
    assert error == f"error: {tmp_path}: 1 defect in 1 of 4 tars; nothing was written, mend or leave out these tars"

    sheet = tmp_path / "sheet.png"
    result = json.loads(tool("inspect_shards", tmp_path, "--json", "--contact-sheet", sheet, "--samples", "7").stdout)
    assert (result["codec"], result["decoded"], result["classes"]["largest"]) == (
        "foreign",
        7,
        {"class": "0 cat", "samples": 4},
    )
    assert Manifest.read(tmp_path / "manifest.json").class_names == NAMES
    assert sheet.exists()
    table = tool("inspect_shards", tmp_path / "theirs-00{0..2}.tar").stdout.splitlines()
    assert table[:2] == ["| | |", "|---|---|"]
    assert "| largest class | 4 samples, 0 cat |" in table
    assert "| classes | 3: cat; dog; bee |" in table


def test_many_defects_are_cut_short_on_the_screen(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", *[(f"{number:03d}.png", b"") for number in range(60)])
    tool("index_shards", tmp_path)
    lines = tool("index_shards", tmp_path, "--verify", expect=2).stdout.splitlines()
    assert len(lines) == 52
    assert lines[50] == "... and 10 more (--report FILE writes all)"
    assert lines[51].endswith(", 60 defects")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("nowhere", "nowhere: there is no such file or folder; correct the path"),
        ("empty", "empty: no tars here; correct the path"),
        ("*.tar", r"\*.tar: no tars here"),
        ("{a,b}/x.tar", r"names tars in 2 folders \(.*a, .*b, ...\), and each has a manifest"),
        ("a/x.{tar", "has unbalanced braces"),
        ("a/*", "a/other.txt: is not called .tar; unpack or rename it"),
        ("pipe:cat a/x.tar", "pipe:cat a/x.tar: only local folders are surveyed"),
        ("s3://bucket/a", "s3://bucket/a: only local folders are surveyed; copy the shards or mount"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b", "empty"):
        Path(folder).mkdir()
        Path(folder, "other.txt").touch()
    for folder in ("a", "b"):
        tar(Path(folder, "x.tar"), ("a.png", png()))
    with pytest.raises(DataError, match=message) as caught:
        find_tars(pattern)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["index_shards", "inspect_shards"])
def test_a_mistake_ends_a_tool_with_exit_code_2(tmp_path: Path, name: str) -> None:
    refused = tool(name, tmp_path / "nowhere", expect=2)
    assert refused.stderr == f"error: {tmp_path}/nowhere: there is no such file or folder; correct the path\n"
    refused = tool(name, "pipe:cat x.tar", expect=2)
    assert refused.stderr.count("\n") == 1


def test_the_tools_do_not_wait_for_torch() -> None:
    code = "import sys, tools.index_shards, tools.inspect_shards; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
