"""Inspection of shards: statistics, balance, contact sheets."""

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from jitscale.data.find import find_tars
from jitscale.data.images import encode
from jitscale.data.manifest import BadInput
from jitscale.data.shards import ShardSet
from jitscale.data.tar_index import index_tar, save_array
from jitscale.data.tar_labels import LabelKey
from jitscale.preparation.array_shards import write_shards
from jitscale.preparation.inspection import (
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
from jitscale.preparation.survey import survey
from tests.preparation.surveying import change_manifest
from tests.support.pictures import number_of, numbered, numbered_png, write_tar


def photographs() -> list[npt.NDArray[np.uint8]]:
    random = np.random.default_rng(1)
    shapes = [(300, 400), (200, 600), (512, 512), (100, 90)]
    images = [
        random.integers(low, 256, (*shape, 3), np.uint8) for low, shape in zip((0, 50, 100, 0), shapes, strict=True)
    ]
    return [*images[:3], np.repeat(images[3][..., :1], 3, axis=-1)]


def test_labels_are_read_from_the_place_named_in_the_manifest(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", ("a.png", numbered_png()), ("a.json", b'{"x": 2}'))
    survey(find_tars(str(tmp_path)), None, 1, key=LabelKey.parse("json:x")).write()
    (tmp_path / "a.index.npy").unlink()
    collection = collect(find_tars(str(tmp_path)), 1)
    assert [index["label"].tolist() for index in collection.indices] == [[2]]


def test_statistics_equal_those_of_numpy(tmp_path: Path) -> None:
    images = photographs()
    write_tar(tmp_path / "a.tar", *[(f"{number}.npy", encode(image, "raw")[1]) for number, image in enumerate(images)])
    write_tar(tmp_path / "b.tar", ("a.png", b"no image"), ("b.png", numbered_png(8, 3)))
    for workers in (1, 2):
        seen = look(collect(find_tars(str(tmp_path)), 1), 100, 0, workers)
        assert [str(defect).split("cannot")[0] for defect in seen.undecodable] == [f"{tmp_path}/b.tar: byte 512: "]
        found = statistics(seen)
        every = [*images, numbered(4)[3]]
        assert found["width"] == {"min": 8, "median": 400, "max": 600}
        assert found["height"] == {"min": 8, "median": 200, "max": 512}
        assert found["share_of_short_sides_below"] == {"256": 3 / 5, "512": 4 / 5}
        assert found["share_grey"] == 1 / 5
        # Enlarging every image to one size by repetition would give them equal weights. The mean of means does the
        # same.
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
        assert (collection.manifest.codec, collection.manifest.resolution) == (("png", 8) if named else ("", None))
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
    """The pixels of an image state its number, and the class follows from the number."""
    count = 400
    write_shards(
        numbered(count), [number % classes for number in range(count)], tmp_path, codec="raw", samples_per_shard=90
    )
    content = contact_sheet(collect(find_tars(str(tmp_path)), 1), seed=0)
    assert len(content) < 1_000_000
    with Image.open(io.BytesIO(content)) as sheet:
        assert sheet.size == (8 * (TILE + 4) + 4, 8 * (TILE + CAPTION + 4) + 4)
        tiles = tiles_of(np.asarray(sheet.convert("RGB")))
    assert all((tile == tile[:1, :1]).all() for tile in tiles)
    numbers = [number_of(tile) for tile in tiles]
    assert [number % classes for number in numbers] == [tile * classes // 64 for tile in range(64)]
    assert len(set(numbers)) == 64


def test_a_contact_sheet_of_noise_stays_small(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, TILE, TILE, 3), np.uint8)
    parts = [(f"{number:02d}.npy", encode(image, "raw")[1]) for number, image in enumerate(noise)]
    write_tar(tmp_path / "a.tar", *parts[:-1], ("z.png", b"no image"))
    content = contact_sheet(collect(find_tars(str(tmp_path)), 1), seed=0)
    assert len(content) < 1_000_000
    with Image.open(io.BytesIO(content)) as sheet:
        # The last tile is grey.
        assert np.ptp(tiles_of(np.asarray(sheet.convert("RGB")))[63].reshape(-1, 3), axis=0).max() == 0


def test_damage_is_counted_and_does_not_end_an_inspection(tmp_path: Path) -> None:
    write_shards(numbered(12), [0] * 12, tmp_path, codec="png", samples_per_shard=4)
    (tmp_path / "shard-000000.tar").unlink()
    lying = index_tar(tmp_path / "shard-000001.tar")
    lying["offset"][0] = -5
    lying["extension"][1] = b"\xff"
    save_array(tmp_path / "shard-000001.index.npy", lying)
    (tmp_path / "shard-000002.index.npy").write_bytes(b"")
    change_manifest(tmp_path, bad=[{"source": "x.jpg", "reason": "broken"}])
    collection = collect(find_tars(str(tmp_path)), 1)
    assert collection.samples == 8
    assert len(collection.defects) == 2
    assert collection.manifest.bad == [BadInput("x.jpg", "broken")]
    seen = look(collection, 100, 0, 1)
    assert (len(seen.found), len(seen.undecodable)) == (6, 2)
    assert contact_sheet(collection, 0)
