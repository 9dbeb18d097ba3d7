"""Transparent pixels show the background, whichever way a file stores transparency."""

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from jitscale.data.background import WHITE, Background, parse_background
from jitscale.data.images import ImageError, decode, decode_file
from jitscale.data.manifest import Manifest
from jitscale.data.shards import ShardSet
from jitscale.errors import DataError
from tests.preparation.surveying import change_manifest, index
from tests.support.pictures import file_bytes, png_bytes, write_tar

DROP, BLUE = parse_background("drop"), parse_background("12,34,200")
GREY_8, RGB_8, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6  # the colour types of PNG

# The pixels and the alpha of the single row of each file, written by hand.
Form = tuple[bytes, list[tuple[int, int, int]], list[int]]
FORMS: dict[str, Form] = {
    "RGBA": (
        png_bytes(8, RGB_ALPHA, bytes([0, 255, 0, 0, 9, 8, 7, 255, 200, 100, 50, 128]), width=3),
        [(0, 255, 0), (9, 8, 7), (200, 100, 50)],
        [0, 255, 128],
    ),
    "RGBA of 16 bits": (
        png_bytes(16, RGB_ALPHA, bytes([1, 9, 2, 9, 3, 9, 0, 9, 4, 9, 5, 9, 6, 9, 255, 255]), width=2),
        [(1, 2, 3), (4, 5, 6)],
        [0, 255],
    ),
    "LA": (png_bytes(8, GREY_ALPHA, bytes([5, 1, 250, 254]), width=2), [(5, 5, 5), (250, 250, 250)], [1, 254]),
    "palette": (
        png_bytes(2, PALETTE, b"\x1b", (b"PLTE", bytes(range(12))), (b"tRNS", b"\xff\x80\0"), width=4),
        [(0, 1, 2), (3, 4, 5), (6, 7, 8), (9, 10, 11)],
        [255, 128, 0, 255],
    ),
    "palette with one transparent colour": (
        png_bytes(8, PALETTE, b"\0\1", (b"PLTE", bytes(range(6))), (b"tRNS", b"\xff\0"), width=2),
        [(0, 1, 2), (3, 4, 5)],
        [255, 0],
    ),
    "grey of 1 bit": (png_bytes(1, GREY_8, b"\x40", (b"tRNS", b"\0\1"), width=2), [(0,) * 3, (255,) * 3], [255, 0]),
    "grey of 2 bits": (
        png_bytes(2, GREY_8, b"\x1b", (b"tRNS", b"\0\2"), width=4),
        [(0,) * 3, (85,) * 3, (170,) * 3, (255,) * 3],
        [255, 255, 0, 255],
    ),
    "grey of 4 bits": (png_bytes(4, GREY_8, b"\x5a", (b"tRNS", b"\0\5"), width=2), [(85,) * 3, (170,) * 3], [0, 255]),
    "grey": (png_bytes(8, GREY_8, b"\5\6", (b"tRNS", b"\0\5"), width=2), [(5,) * 3, (6,) * 3], [0, 255]),
    "RGB": (
        png_bytes(8, RGB_8, bytes([5, 6, 7, 5, 6, 8]), (b"tRNS", bytes([0, 5, 0, 6, 0, 7])), width=2),
        [(5, 6, 7), (5, 6, 8)],
        [0, 255],
    ),
    "RGB of 16 bits": (
        png_bytes(
            16, RGB_8, bytes([5, 9, 6, 9, 7, 9, 5, 0, 6, 0, 8, 0]), (b"tRNS", bytes([5, 9, 6, 9, 7, 9])), width=2
        ),
        [(5, 6, 7), (5, 6, 8)],
        [0, 255],
    ),
    "WebP": (
        file_bytes(np.array([[[0, 255, 0, 0], [9, 8, 7, 255]]], np.uint8), "WEBP", lossless=True, exact=True),
        [(0, 255, 0), (9, 8, 7)],
        [0, 255],
    ),
}


def over(pixels: npt.ArrayLike, alpha: npt.ArrayLike, colour: tuple[int, int, int]) -> npt.NDArray[np.uint8]:
    """Compositing by its definition, in double precision."""
    share = np.array(alpha, np.float64)[..., None] / 255
    return np.rint(np.array(pixels) * share + np.array(colour) * (1 - share)).astype(np.uint8)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_transparency_is_composited(form: str) -> None:
    data, pixels, alpha = FORMS[form]
    for background, colour in ((WHITE, (255, 255, 255)), (parse_background("black"), (0, 0, 0)), (BLUE, BLUE.colour)):
        assert colour is not None
        found = decode_file(data, "png", background=background)
        np.testing.assert_array_equal(found.image[0], over(pixels, alpha, colour))
        assert found.transparent
    dropped = decode_file(data, "png", background=DROP)
    np.testing.assert_array_equal(dropped.image[0], pixels)
    assert dropped.transparent, "the image is counted as transparent, although its hidden colours are visible"
    np.testing.assert_array_equal(decode(data, "png"), decode(data, "png", background=WHITE))


def test_every_value_and_alpha_is_rounded_to_the_nearest() -> None:
    pixels = np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (256, 1, 3))
    alpha = np.tile(np.arange(256, dtype=np.uint8)[:, None], (1, 256))
    for colour in ((255, 0, 128), (1, 254, 77)):
        np.testing.assert_array_equal(Background(colour).behind(pixels, alpha), over(pixels, alpha, colour))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_an_opaque_picture_keeps_its_pixels(mode: str) -> None:
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8))
    options = {"transparency": b"\xff" * 200} if mode == "P" else {}
    picture = rgb.convert("L").convert(mode) if mode == "LA" else rgb.convert(mode)
    data = file_bytes(picture, "PNG", **options)
    assert (b"tRNS" in data) == (mode == "P")
    found = decode_file(data, "png", background=BLUE)
    assert not found.transparent
    np.testing.assert_array_equal(found.image, np.asarray(picture.convert("RGB")))


def test_one_channel_is_the_luma_of_the_composited_image() -> None:
    data = FORMS["RGBA"][0]
    composited = Image.fromarray(decode(data, "png", background=BLUE))
    found = decode(data, "png", background=BLUE, channels=1)
    np.testing.assert_array_equal(found[..., 0], np.asarray(composited.convert("L")))


def test_grey_images_of_sixteen_bits_are_refused() -> None:
    with pytest.raises(ImageError, match=r"mode I;16.*convert it to 8 bits"):
        decode(png_bytes(16, GREY_8, bytes(4), (b"tRNS", b"\0\0"), width=2), "png")


@pytest.mark.parametrize("text", ["white", "black", "drop", "12,34,56", "0,0,1"])
def test_a_background_can_be_read_from_its_own_text(text: str) -> None:
    assert str(parse_background(text)) == text


def test_a_named_colour_is_written_as_its_name() -> None:
    assert [str(parse_background(text)) for text in ("255,255,255", "0,0,0")] == ["white", "black"]


@pytest.mark.parametrize("text", ["", "red", "White", "1,2", "1,2,3,4", "1,2,256", "-1,2,3", "1, 2,3", "1,2,\u0663"])
def test_texts_that_are_not_a_background_are_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"is unknown; give white, black, drop .*, or R,G,B in 0\.\.255"):
        parse_background(text)


def test_each_folder_is_composited_over_its_own_background(tmp_path: Path) -> None:
    """One folder has no manifest. Another one has an old manifest that states no background."""
    data = FORMS["RGB"][0]
    backgrounds = {"a": "drop", "b": "12,34,200", "c": None, "d": "old"}
    for name, background in backgrounds.items():
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "x.tar", ("k.png", data))
        if background is not None:
            index(tmp_path / name)
            change_manifest(tmp_path / name, background=background)
    old = tmp_path / "d" / "manifest.json"
    content = json.loads(old.read_text())
    for field in ("background", "transparent", "channels"):
        del content[field]
    old.write_text(json.dumps(content))
    found = Manifest.read(old)
    assert (found.background, found.transparent, found.channels) == ("white", None, 3)
    shards = ShardSet.open(str(tmp_path / "{a,b,c,d}" / "x.tar"), 0)
    for shard, background in enumerate((DROP, BLUE, WHITE, WHITE)):
        colour = (5, 6, 7) if background.colour is None else background.colour
        assert shards.read(shard, 0)[0].tolist() == [[list(colour)]], "the crop contains the left pixel"


def test_another_background_makes_different_data(tmp_path: Path) -> None:
    """Otherwise a run would resume with other pixels, and a stored measurement would belong to other images."""
    write_tar(tmp_path / "x.tar", ("k.png", FORMS["RGBA"][0]))
    index(tmp_path)
    before = ShardSet.open(tmp_path, 0).manifest_hash
    change_manifest(tmp_path, background="black")
    assert ShardSet.open(tmp_path, 0).manifest_hash != before
    change_manifest(tmp_path, background="white")
    assert ShardSet.open(tmp_path, 0).manifest_hash == before
