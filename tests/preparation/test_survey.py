"""Surveys of foreign tars, which turn them into shards."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jitscale.data.images import encode
from jitscale.data.manifest import read_class_names
from jitscale.data.shards import ShardSet
from jitscale.data.tar_index import index_tar
from jitscale.errors import DataError
from jitscale.preparation.array_shards import write_shards
from jitscale.preparation.processes import in_processes
from tests.preparation.surveying import NAMES, defects, flip, index, offset, theirs
from tests.support import ROOT
from tests.support.pictures import numbered, numbered_png, samples_of, write_tar


def test_tars_with_numbers_become_shards(tmp_path: Path) -> None:
    theirs(tmp_path, lambda number: {"cls": number % 3})
    before = samples_of(ShardSet.open(tmp_path, 3))
    manifest = index(tmp_path).manifest
    assert (manifest.codec, manifest.resolution, manifest.num_classes, manifest.class_names) == ("foreign", 8, 3, None)
    assert [record.samples for record in manifest.shards] == [4, 4, 2]
    shards = ShardSet.open(tmp_path, 3, 8)
    assert samples_of(shards) == before == [(number, number % 3) for number in range(10)]
    for path in tmp_path.glob("*.tar"):
        np.testing.assert_array_equal(np.load(path.with_suffix(".index.npy")), index_tar(path))
    assert defects(tmp_path) == []
    written = (tmp_path / "manifest.json").read_bytes()
    index(tmp_path, workers=2)
    assert (tmp_path / "manifest.json").read_bytes() == written
    assert ShardSet.open(tmp_path, 3).manifest_hash == shards.manifest_hash


@pytest.mark.parametrize("given", [None, NAMES])
def test_names_are_numbered_in_sorted_or_given_order(tmp_path: Path, given: list[str] | None) -> None:
    """The second shard holds one class only. The first one has the classes in another order than the sorted one."""
    theirs(tmp_path, lambda number: {"cls": NAMES[number % 3 if number < 4 else 1]})
    manifest = index(tmp_path, given).manifest
    expected = given or sorted(NAMES)
    assert manifest.class_names == expected
    assert manifest.num_classes == 3
    samples = [(number, expected.index(NAMES[number % 3 if number < 4 else 1])) for number in range(10)]
    assert samples_of(ShardSet.open(tmp_path, 3)) == samples
    assert defects(tmp_path) == []


def test_tars_without_labels_become_unlabelled_shards(tmp_path: Path) -> None:
    theirs(tmp_path, lambda number: {"txt": f"image {number}"})
    manifest = index(tmp_path).manifest
    assert (manifest.num_classes, manifest.class_names) == (0, None)
    assert samples_of(ShardSet.open(tmp_path, 0)) == [(number, 0) for number in range(10)]
    assert defects(tmp_path) == []
    with pytest.raises(DataError, match="the manifest says that there are no labels"):
        ShardSet.open(tmp_path, 3)


def test_a_file_of_names_limits_the_numbers(tmp_path: Path) -> None:
    theirs(tmp_path, lambda number: {"cls": number % 4})
    assert index(tmp_path, ["a", "b", "c", "d", "e"]).manifest.num_classes == 5
    (tmp_path / "manifest.json").unlink()
    found = [str(defect) for defect in index(tmp_path, NAMES).defects]
    assert [re.sub(r"byte \d+", "byte N", line.removeprefix(f"{tmp_path}/")) for line in found] == [
        f"theirs-00{shard}.tar: byte N: sample 3 has label 3, none of the 3 classes; correct it or their file"
        for shard in range(2)
    ]


def test_a_glob_may_exclude_tars(tmp_path: Path) -> None:
    theirs(tmp_path, lambda number: {"cls": 0})
    assert [record.name for record in index(tmp_path / "theirs-00[12].tar").manifest.shards] == [
        "theirs-001.tar",
        "theirs-002.tar",
    ]
    assert ShardSet.open(tmp_path, 1).num_samples == 6
    assert not (tmp_path / "theirs-000.index.npy").exists()


def test_every_defect_is_reported_and_nothing_written(tmp_path: Path) -> None:
    """Kinds of labels are mixed, and damaged tars lie between sound ones."""
    image = numbered_png()
    paths = {
        "a": write_tar(
            tmp_path / "a.tar", ("a.png", image), ("a.cls", b"1"), ("b.png", image), ("c.png", image), ("c.cls", b"cat")
        ),
        "b": write_tar(tmp_path / "b.tar", ("a.png", image), ("a.cls", b"-1"), ("b.png", image), ("b.cls", b"")),
        "c": write_tar(
            tmp_path / "c.tar",
            *[(f"{number}.{part}", data) for number in range(9) for part, data in (("png", image), ("cls", b"2"))],
        ),
        "d": write_tar(
            tmp_path / "d.tar",
            ("a.cls", b""),
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
    block = 512 + 512 * -(-len(image) // 512)  # the bytes of an image
    before = sorted(os.listdir(tmp_path))
    found = index(tmp_path, workers=2)
    assert sorted(os.listdir(tmp_path)) == before
    expected = [
        f"a.tar: byte {offset(paths['a'], 1)}: sample 1 has no label where a number is expected; make",
        f"a.tar: byte {offset(paths['a'], 2)}: sample 2 has label 'cat' where a number is expected; make",
        "b.tar: byte 512: sample 0 has label '-1', a number outside 0..2147483647; write",
        f"b.tar: byte {512 + block + 1024}: sample 1 has label '', nothing; write",
        "d.tar: byte 0: sample 'a' has 0 images among ['cls'], needs",
        "d.tar: byte 1024: sample 0 has label '\ufffd', not printable UTF-8",
        f"d.tar: byte {512 + block + 1024}: key 'b' occurs twice",
        f"e.tar: byte {offset(paths['a'], 1)}: sample 1 has no label where a number is expected; make",
        f"e.tar: byte {offset(paths['a'], 2) - 512}: is not a complete tar (unexpected end of data; it ends at byte",
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


def test_the_resolution_is_stored_if_all_images_share_it(tmp_path: Path) -> None:
    """Only headers are read, even if they lie far inside a file. An undecodable image does not count."""
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(noise).save(stream, "JPEG", icc_profile=bytes(200_000))
    square = [("a.jpg", stream.getvalue()), ("b.npy", encode(noise, "raw")[1]), ("c.webp", encode(noise, "webp")[1])]
    write_tar(tmp_path / "a.tar", *square)
    write_tar(tmp_path / "b.tar", ("a.png", b"no image"))
    found = index(tmp_path)
    assert (found.manifest.resolution, [scan.undecodable for scan in found.scans]) == (16, [0, 1])
    for name, image in (("other", numbered_png(8)), ("oblong", encode(noise[:8], "png")[1])):
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "a.tar", *square, ("d.png", image))
        assert index(tmp_path / name).manifest.resolution is None
    (tmp_path / "all_oblong").mkdir()
    write_tar(tmp_path / "all_oblong" / "a.tar", ("d.png", image))
    assert index(tmp_path / "all_oblong").manifest.resolution is None


def test_indexing_again_keeps_the_manifest_of_a_packing(tmp_path: Path) -> None:
    labels = [number % 2 for number in range(10)]
    write_shards(numbered(10), labels, tmp_path, samples_per_shard=4, class_names=["x", "y"])
    manifest, beside = (tmp_path / "manifest.json").read_bytes(), tmp_path / "shard-000001.index.npy"
    content = beside.read_bytes()
    beside.unlink()
    assert defects(tmp_path) == [
        f"{tmp_path}/shard-000001.tar: has no index next to it; rebuild it with tools/index_shards.py --force"
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
    """Indexes are written first: with the old manifest their labels would have another meaning."""
    index(theirs(tmp_path / "t", lambda number: {"cls": ["cat", "dog"][number % 2]}), ["cat", "dog"])

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("jitscale.data.tar_index.save_array", killed)
    with pytest.raises(KeyboardInterrupt):
        index(tmp_path / "t", ["dog", "cat"])
    assert not (tmp_path / "t/manifest.json").exists()
    monkeypatch.undo()
    index(tmp_path / "t", ["dog", "cat"])
    assert ShardSet.open(tmp_path / "t", 2, 8).read(0, 0)[1] == 1


def test_ctrl_c_and_mistakes_under_slurm(tmp_path: Path) -> None:
    """A tool reports that it was stopped. Under Slurm it reports its mistakes whichever task it is."""
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


def test_invalid_files_of_class_names_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_text("tench\r\ngreat white shark\n2\n\n")
    assert read_class_names(path) == ["tench", "great white shark", "2"]
    for text, message in [
        ("a\n\nb", "line 2: is empty"),
        ("a\nb\na", "line 3: 'a' is in line 1 too"),
        ("a\n0", "line 2: names class 1 '0', the number of another"),
    ]:
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            read_class_names(path)
    with pytest.raises(DataError, match="cannot be read as class names"):
        read_class_names(tmp_path / "nowhere")


def test_a_killed_process_is_a_one_line_error() -> None:
    with pytest.raises(DataError, match=r"worker process .*: ended with exit code [34]; start again, maybe with fewer"):
        list(in_processes(os._exit, [3, 4], 2))
