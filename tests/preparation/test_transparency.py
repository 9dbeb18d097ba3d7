"""Transparent and grey images through tools/make_shards.py, tools/index_shards.py and tools/inspect_shards.py."""

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from jitscale.data.find import find_tars
from jitscale.data.images import center_crop, decode
from jitscale.data.manifest import Manifest
from jitscale.data.shards import ShardSet
from jitscale.errors import DataError
from jitscale.preparation.inspection import TILE, collect, contact_sheet, look, statistics
from jitscale.preparation.packing_job import PackingJob
from jitscale.preparation.packing_plan import PackingOptions
from tests.preparation.packing_jobs import (
    RESOLUTION,
    alone,
    command,
    packed,
    refused,
    samples,
)
from tests.preparation.surveying import defects, tool
from tests.support.pictures import file_bytes, noise, write_tar

COLOURS = {"white": (255, 255, 255), "black": (0, 0, 0), "12,34,200": (12, 34, 200)}


def emoji(number: int, alpha: int = 0) -> npt.NDArray[np.uint8]:
    """Noise on the left. On the right lies a hidden colour, green as in a set of emoji."""
    pixels = np.dstack([noise(number, 16, 16), np.full((16, 16), 255, np.uint8)])
    pixels[:, 8:] = (0, 255, 0, alpha)
    return pixels


def write_emoji(folder: Path, count: int = 5) -> Path:
    """Write this many transparent images, and one that is opaque although it has alpha."""
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:02d}.png").write_bytes(file_bytes(emoji(number)))
    (folder / "opaque.png").write_bytes(file_bytes(emoji(99, alpha=255)))
    return folder


@pytest.mark.parametrize("background", [*COLOURS, "drop"])
@pytest.mark.parametrize("codec", ["raw", "original"])
def test_hidden_colours_stay_hidden(tmp_path: Path, codec: str, background: str) -> None:
    """The pixels are the same whether they are composited while packing or while reading."""
    source, output = write_emoji(tmp_path / "in"), tmp_path / "out"
    options = () if background == "white" else ("--background", background)
    finished = alone(source, output, *options, codec=codec)
    assert finished.code == 0, finished.err
    said = f"over a {background} background (--background)"
    if background == "drop":
        said = "whose hidden colours show (--background drop)"
    assert f"0 bad; 5 images with transparency, {said}\n" in finished.out
    manifest = Manifest.read(output / "manifest.json")
    assert (manifest.background, manifest.transparent, manifest.channels) == (background, 5, 3)
    shards = ShardSet.open(output, 0, RESOLUTION)
    colours = set()
    for shard, count in enumerate(shards.samples_per_shard):
        colours |= {tuple(shards.read(shard, row)[0][5, 12].tolist()) for row in range(count)}
    assert colours == {COLOURS.get(background, (0, 255, 0)), (0, 255, 0)}, "the opaque image is green"
    assert defects(output) == []
    collection = collect(find_tars(str(output)), 1)
    assert collection.manifest_hash == shards.manifest_hash
    (tmp_path / "sheet.png").write_bytes(contact_sheet(collection, 0))
    with Image.open(tmp_path / "sheet.png") as sheet:
        tiles = np.asarray(sheet.convert("RGB"))[4 + TILE // 2, 4 + TILE * 3 // 4 :: TILE + 4][:6]
    assert sorted(map(tuple, tiles.tolist())) == sorted([COLOURS.get(background, (0, 255, 0))] * 5 + [(0, 255, 0)])
    seen = statistics(look(collection, 100, 0, 1))
    pixels = np.concatenate([shards.read(s, r)[0] for s, n in enumerate(shards.samples_per_shard) for r in range(n)])
    np.testing.assert_allclose(seen["rgb_mean_255"], pixels.mean((0, 1)))


def test_opaque_images_give_no_message(tmp_path: Path) -> None:
    finished = alone(write_emoji(tmp_path / "in", count=0), tmp_path / "out")
    assert "0 bad\n" in finished.out
    assert Manifest.read(tmp_path / "out" / "manifest.json").transparent == 0


def test_a_job_continues_with_its_own_background_and_channels_only(tmp_path: Path) -> None:
    source, output = write_emoji(tmp_path / "in"), tmp_path / "out"
    assert alone(source, output, "--part", "1/2").code == 0
    other = ("--background", "drop", "--channels", "1")
    message = refused(*command(source, output, *other))
    assert "was begun with --background white --channels 3, not with --background drop --channels 1" in message
    packed(source, output)
    assert "another --background and --channels" in refused(*command(source, output, *other))
    # A colour and its name give the same background.
    assert "is there already" in alone(source, output, "--background", "255,255,255").out


def test_a_mistake_is_a_one_line_error(tmp_path: Path) -> None:
    source, output = write_emoji(tmp_path / "in"), tmp_path / "out"
    message = refused(*command(source, output, "--background", "red"))
    assert "background 'red': is unknown; give white, black, drop" in message
    message = refused(*command(source, output, "--channels", "1", codec="original"))
    assert "channels 1: codec original keeps the files as they are; leave out --channels" in message
    with pytest.raises(DataError, match=r"channels 2: choose 1 \(grey\) or 3"):
        PackingOptions([str(source)], "raw", 8, 10, 0, channels=2)
    assert not output.exists()


@pytest.mark.parametrize("codec", ["raw", "png", "webp", "jpeg"])
def test_grey_data_stays_grey(tmp_path: Path, codec: str) -> None:
    """Colours become luma, after transparent pixels were composited."""
    source, output = write_emoji(tmp_path / "in", count=20), tmp_path / "out"
    options = PackingOptions([str(source)], "raw", RESOLUTION, 100, 0, channels=1)
    manifest = packed(source, output, "--channels", "1", "--samples-per-shard", "100", codec=codec)
    assert (manifest.channels, manifest.transparent) == (1, 20)
    for number, sample in samples(output).items():
        ((extension, data),) = sample.items()
        file = sorted(source.iterdir())[number].read_bytes()
        luma = np.asarray(Image.fromarray(center_crop(decode(file, "png"), RESOLUTION)).convert("L"))
        found = decode(data, extension, channels=1)
        assert found.shape == (RESOLUTION, RESOLUTION, 1)
        np.testing.assert_allclose(found[..., 0].astype(int), luma, atol=25 if codec == "jpeg" else 0)
        if codec == "raw":
            assert len(data) == 128 + RESOLUTION**2
    if codec == "raw":
        to_write = PackingJob(tmp_path / "other", options).bytes_to_write()
        assert to_write == sum(record.bytes for record in manifest.shards)
    assert defects(output) == []
    assert ShardSet.open(output, 0, channels=1).read(0, 0)[0].shape == (RESOLUTION, RESOLUTION, 1)


def test_the_background_of_foreign_tars_is_kept(tmp_path: Path) -> None:
    """The background stays until --force and --background change it together."""
    write_tar(tmp_path / "a.tar", *[(f"{number}.png", file_bytes(emoji(number))) for number in range(3)])

    def colour() -> list[int]:
        return ShardSet.open(tmp_path, 0).read(0, 1)[0][5, 12].tolist()

    assert colour() == [255, 255, 255]
    tool("index_shards", tmp_path, "--background", "0,0,0")
    assert Manifest.read(tmp_path / "manifest.json").background == "black"
    assert colour() == [0, 0, 0]
    assert "is indexed already" in tool("index_shards", tmp_path, "--background", "black").stdout
    said = tool("index_shards", tmp_path, "--background", "12,34,200", expect=2).stderr
    assert said == (f"error: {tmp_path}/manifest.json: says --background black, not 12,34,200; --force changes it\n")
    tool("index_shards", tmp_path, "--force")
    assert colour() == [0, 0, 0], "the background is kept, because none is given"
    tool("index_shards", tmp_path, "--force", "--background", "12,34,200")
    assert colour() == [12, 34, 200]
    shown = json.loads(tool("inspect_shards", tmp_path, "--json").stdout)
    assert (shown["background"], shown["transparent"], shown["channels"]) == ("12,34,200", None, 3)
    assert (
        "background 'red': is unknown"
        in tool("index_shards", tmp_path, "--force", "--background", "red", expect=2).stderr
    )
    assert (
        "--verify writes nothing" in tool("index_shards", tmp_path, "--verify", "--background", "red", expect=2).stderr
    )


def test_indexing_does_not_change_the_background_of_packing(tmp_path: Path) -> None:
    packed(write_emoji(tmp_path / "in"), tmp_path / "out", codec="original")
    said = tool("index_shards", tmp_path / "out", "--force", "--background", "black", expect=2).stderr
    assert "came from packing, which chose the background; leave out --background" in said
