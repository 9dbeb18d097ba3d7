"""Verification of shards: one run finds every kind of damage."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from jitscale.data.find import find_tars
from jitscale.data.shards import ShardSet
from jitscale.data.tar_index import index_path, index_tar, save_array, scan_tar
from jitscale.errors import DataError
from jitscale.preparation.array_shards import write_shards
from jitscale.preparation.verification import verify
from tests.preparation.surveying import change_manifest, defects, flip, index, offset, theirs, tool
from tests.support.pictures import numbered, numbered_png, write_tar


@pytest.mark.parametrize("codec", ["raw", "png", "jpeg"])
def test_sound_shards_have_no_defects(tmp_path: Path, codec: str) -> None:
    write_shards(numbered(20), [number % 3 for number in range(20)], tmp_path, codec=codec, samples_per_shard=8)
    result = verify(find_tars(str(tmp_path)), 2)
    assert result.defects == []
    assert (result.shards, result.samples) == (3, 20)
    assert result.bytes == sum(path.stat().st_size for path in tmp_path.glob("*.tar"))


def vouch(folder: Path) -> None:
    """Write a manifest that agrees with the tars in their current state, with fresh indices."""
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").unlink()
    fresh = index(folder).manifest
    shards = [{"name": s.name, "samples": s.samples, "bytes": s.bytes, "sha256": s.sha256} for s in fresh.shards]
    (folder / "manifest.json").write_text(json.dumps({**manifest, "shards": shards, "total": fresh.total}))


def test_damage_of_every_kind_is_found_in_one_run(tmp_path: Path) -> None:
    """Each shard has one kind of damage, all in one folder. No defect hides another one."""
    images = np.random.default_rng(0).integers(0, 256, (36, 16, 16, 3), np.uint8)
    write_shards(images, [number % 3 for number in range(36)], tmp_path, codec="jpeg", samples_per_shard=4)
    paths = sorted(tmp_path.glob("*.tar"))
    rows = [index_tar(path) for path in paths]
    # 0: a broken image and a label out of range, in a shard that agrees with the manifest
    image_at = int(rows[0]["offset"][2])
    data = bytearray(paths[0].read_bytes())
    data[image_at + 200 : image_at + 300] = bytes(100)
    data[scan_tar(paths[0])[1].label_offset] = ord("7")
    paths[0].write_bytes(data)
    vouch(tmp_path)
    # 1: another byte, but the same pixels; 2: cut inside the third sample; 3: missing
    flip(paths[1], int(rows[1]["offset"][1]) + 14)  # the density in the JFIF header
    cut = int(rows[2]["offset"][2]) + 20
    paths[2].write_bytes(paths[2].read_bytes()[:cut])
    paths[3].unlink()
    # 4: an index with a wrong label; 5: with a wrong number of samples; 6: not an index; 7: missing
    lying = index_tar(paths[4])
    lying["label"][3] = (lying["label"][3] + 1) % 3
    save_array(index_path(paths[4]), lying)
    save_array(index_path(paths[5]), index_tar(paths[5])[:3])
    paths[6].with_suffix(".index.npy").write_bytes(b"nothing")
    paths[7].with_suffix(".index.npy").unlink()
    # 8: a manifest with a wrong number of samples
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["shards"][8]["samples"] = 5
    change_manifest(tmp_path, shards=manifest["shards"], total=37)

    def sample(shard: int, row: int) -> int:
        return int(rows[shard]["offset"][row])

    size = manifest["shards"][2]["bytes"]
    lies = r"shard-000004.index.npy differs in 1 of 4 samples: of sample 3 it says .*, the tar .* --force"
    expected = [
        (0, sample(0, 1), "has label '7', needs one in 0..2; write the shard again"),
        (0, sample(0, 2), "sample 2 cannot be decoded as jpg (.*); write the shard again without it, or keep it"),
        (1, None, "has sha256 .*, the manifest says .*; copy it again"),
        (2, None, f"has {cut} bytes, the manifest says {size}; copy it again"),
        (2, sample(2, 2) - 512, rf"is not a complete tar \(unexpected end of data; it ends at byte {cut}, .*; copy"),
        (3, None, "is missing; copy it again"),
        (4, sample(4, 3), lies),
        (5, None, "holds 4 samples, shard-000005.index.npy lists 3; rebuild"),
        (6, None, "has an index that cannot be mapped .*; remove it"),
        (7, None, "has no index next to it; rebuild"),
        (8, None, "holds 4 samples, the manifest says 5; write the manifest again"),
    ]
    found = verify(find_tars(str(tmp_path)), 2)
    assert [(defect.path, defect.byte) for defect in found.defects] == [
        (paths[shard], byte) for shard, byte, _ in expected
    ]
    for defect, (_, _, message) in zip(found.defects, expected, strict=True):
        assert re.search(message, str(defect)), str(defect)
        assert "\n" not in str(defect)
    # Only the given tars are verified, not all tars of the manifest.
    assert defects(paths[8]) == [str(found.defects[-1])]
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


def test_a_changed_byte_of_raw_pixels_is_found_by_its_hash(tmp_path: Path) -> None:
    write_shards(numbered(8), [0] * 8, tmp_path, codec="raw", samples_per_shard=4)
    path = tmp_path / "shard-000001.tar"
    flip(path, offset(path, 2) + 200)
    ShardSet.open(tmp_path, 1)
    (line,) = defects(tmp_path)
    assert re.fullmatch(rf"{path}: has sha256 \w+\.\.\., the manifest says \w+\.\.\.; copy it again", line)


def test_a_wrong_label_is_not_blamed_on_the_index(tmp_path: Path) -> None:
    write_shards(numbered(4), [0] * 4, tmp_path)
    path = tmp_path / "shard-000000.tar"
    flip(path, scan_tar(path)[3].label_offset)
    digest, label = defects(tmp_path)
    assert "has sha256" in digest
    assert label.startswith(f"{path}: byte {offset(path, 3)}: sample 3 has label '\ufffd', needs one in 0..0")


def test_the_statements_of_the_manifest_about_images_are_checked(tmp_path: Path) -> None:
    write_shards(numbered(3), [0, 1, 1], tmp_path, class_names=["a", "b"])
    change_manifest(tmp_path, resolution=9, num_classes=1)
    manifest, *lines = defects(tmp_path)
    assert manifest == f"{tmp_path}/manifest.json: names 2 classes and counts 1; write it again"
    assert len(lines) == 5
    assert sum("is 8 x 8 pixels, but the manifest says 9 per side" in line for line in lines) == 3
    assert sum("has label '1', needs one in 0..0" in line for line in lines) == 2
    write_tar(tmp_path / "more.tar", ("a.png", numbered_png()))
    assert f"{tmp_path}/more.tar: is not named by manifest.json; choose another pattern or index the folder again" in (
        defects(tmp_path / "*.tar")
    )


def test_a_folder_without_manifest_cannot_be_verified(tmp_path: Path) -> None:
    theirs(tmp_path, lambda number: {})
    with pytest.raises(DataError, match=r"has no manifest.json to compare .*; make one with tools/index_shards.py"):
        defects(tmp_path)
