"""Conversion of images between bytes and pixels."""

import hashlib
import io
import os
import re
import struct
import zlib

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from jitscale.data.images import CODECS, ImageError, center_crop, content_extension, decode, dimensions, encode
from jitscale.errors import DataError
from tests.support.pictures import file_bytes


def photograph(height: int = 24, width: int = 20) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def row(values: list[int], height: int) -> npt.NDArray[np.uint8]:
    """An image of three equal channels in which every row equals `values`."""
    return np.tile(np.array(values, np.uint8)[None, :, None], (height, 1, 3))


@pytest.mark.parametrize(("codec", "extension"), [item for item in CODECS.items() if item[0] != "jpeg"])
def test_every_lossless_codec_returns_the_same_pixels(codec: str, extension: str) -> None:
    image = photograph()
    assert encode(image, codec)[0] == extension
    np.testing.assert_array_equal(decode(encode(image, codec)[1], extension), image)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_other_colour_modes_become_rgb(mode: str) -> None:
    picture = Image.new("RGB", (5, 4), (255, 255, 255)).convert(mode)
    form, extension = ("JPEG", "jpeg") if mode == "CMYK" else ("PNG", "png")
    image = decode(file_bytes(picture, form), extension)
    assert image.shape == (4, 5, 3)
    assert image.min() >= 254


def test_png_that_is_called_jpeg_is_read() -> None:
    image = photograph()
    np.testing.assert_array_equal(decode(encode(image, "png")[1], "jpeg"), image)


def test_sixteen_bits_are_refused() -> None:
    deep = Image.fromarray(np.full((4, 4), 40_000, np.uint16))
    with pytest.raises(DataError, match=r"mode I;16.*convert it to 8 bits"):
        decode(file_bytes(deep, "PNG"), "png")


def test_pickles_are_refused() -> None:
    stream = io.BytesIO()
    np.save(stream, np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(DataError, match="object"):
        decode(stream.getvalue(), "npy")
    with pytest.raises(DataError, match="'pth' is not that of an image"):
        decode(b"", "pth")


def test_unknown_codec_is_refused() -> None:
    with pytest.raises(DataError, match=r"'gif'.*raw, png, webp"):
        encode(photograph(), "gif")


@pytest.mark.parametrize("extension", ["npy", "png", "webp", "jpg"])
def test_damage_gives_a_data_error_or_an_image(extension: str) -> None:
    """Damage raises no other kind of exception. A truncated file is always noticed."""
    codecs = {written: codec for codec, written in CODECS.items()}
    image = photograph(32, 32)
    data = encode(image, codecs[extension])[1] if extension in codecs else file_bytes(Image.fromarray(image), "JPEG")
    for length in range(0, len(data) // 2, 37):
        with pytest.raises(DataError):
            decode(data[:length], extension)
    rng = np.random.default_rng(1)
    for _ in range(400):
        damaged = bytearray(data)
        damaged[int(rng.integers(min(len(data), 200)))] = int(rng.integers(256))
        try:
            decode(bytes(damaged), extension)
        except DataError:
            continue


def test_crop_halves_with_a_box_filter() -> None:
    """4 -> 2: the result is the mean of pairs. A bicubic filter reaches further: 80 would leak into the right pixel."""
    np.testing.assert_array_equal(center_crop(row([80, 0, 0, 0], 4), 2), row([40, 0], 2))


def test_crop_halves_an_odd_side_by_the_pixels_whose_centres_are_in_the_box() -> None:
    """5 -> 2: the boxes are [0, 2.5] and ]2.5, 5]. The centre of the middle pixel lies in the first box."""
    np.testing.assert_array_equal(center_crop(row([0, 50, 100, 150, 200], 5), 2), row([50, 175], 2))


def test_crop_halves_twice() -> None:
    """8 -> 4 -> 2: the result is the mean of four pixels."""
    np.testing.assert_array_equal(center_crop(row([40, 0, 0, 0, 8, 8, 8, 8], 8), 2), row([10, 8], 2))


def test_crop_takes_the_centre_of_the_long_side() -> None:
    wide = row([10, 20, 30, 40, 50], 2)
    np.testing.assert_array_equal(center_crop(wide, 2), row([20, 30], 2))
    np.testing.assert_array_equal(center_crop(wide.transpose(1, 0, 2), 2), row([20, 30], 2).transpose(1, 0, 2))


def test_crop_is_bicubic_below_twice_the_size() -> None:
    """3 -> 2: the filter has a = -1/2 and support 3.

    Its weights lie at the distances 1/6, 1/2, 7/6 of the stretched kernel.
    """

    def kernel(x: float) -> float:
        return 1.5 * x**3 - 2.5 * x**2 + 1 if x < 1 else -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2

    weights = np.array([kernel(1 / 6), kernel(1 / 2), kernel(7 / 6)])
    expected = round(float(200 * weights[0] / weights.sum()))
    cropped = center_crop(row([200, 0, 0], 3), 2)
    assert abs(int(cropped[0, 0, 0]) - expected) <= 1
    assert cropped[0, 1, 0] == 0  # The negative lobe is clipped.


def test_crop_enlarges_smaller_images() -> None:
    """ADM does the same. Bicubic interpolation preserves a constant."""
    image = np.full((20, 24, 3), 77, np.uint8)
    assert np.array_equal(center_crop(image, 30), np.full((30, 30, 3), 77, np.uint8))


def synthetic(height: int, width: int) -> npt.NDArray[np.uint8]:
    """An image from integer arithmetic alone, with gradients and edges."""
    rows, columns = np.indices((height, width))
    channels = [rows * 7 + columns * 3, rows * columns // 5, (rows ^ columns) * 11 + rows * rows // 9]
    return (np.stack(channels, axis=-1) % 256).astype(np.uint8)


# These are sha256 hashes of the crops that the routine published with arXiv 2105.05233 (guided-diffusion,
# image_datasets.py) returns for `synthetic` images under Pillow 13.0.0 and numpy 2.4.6 on x86-64.
PUBLISHED_CROPS = [
    (375, 500, 256, "fccc3320aeaacb012cf6f9241086e539c727bb70cba79a85df6639683c22cb84"),
    (500, 333, 256, "bae1c24a845dae4178cb824120b69bb55d695753c48bc1e5c9dfd5ddaabc9041"),
    (512, 512, 256, "ff1dc4c0d5b67704d9af9be29fb738ecba130ba0025a63c1643cc5cf7ff04193"),
    (1100, 1301, 256, "df9a2cda90085bc26d6e9474f98d9bcd119a2f31c6f4c9345cc444e28ae9ce46"),
    (97, 131, 256, "7ca9aa39156d42c6ab79d0f7a8fd58d1f20f20a9f0657d2b1ff49c9bc1e4e2a5"),
    (257, 1023, 64, "6abd550c91bd59417d76b7555d257ec8f8b92a1fc1b5f8a3cf966a97d561dd8a"),
    (301, 201, 32, "7235d9332a1328580837d1206649b44ca8898509c726e46bb600e67e551af14c"),
    (1537, 1025, 256, "293f8e910cd93d0205df65a7db53e93565676ca8c13b8fc4734ee48d572da5fc"),
    (256, 256, 256, "97760fbc2349f502988e0a60db7725789c97cfad7587fe241553f83329025fe0"),
]


@pytest.mark.parametrize(("height", "width", "size", "digest"), PUBLISHED_CROPS)
def test_crop_is_bit_equal_to_the_published_one(height: int, width: int, size: int, digest: str) -> None:
    crop = np.ascontiguousarray(center_crop(synthetic(height, width), size))
    assert crop.shape == (size, size, 3)
    assert hashlib.sha256(crop.tobytes()).hexdigest() == digest


def test_messages_of_decoders_are_reproducible() -> None:
    """The message becomes part of a manifest, so it must not contain memory addresses."""
    reasons = set()
    for _ in range(2):
        with pytest.raises(DataError) as caught:
            decode(bytes(range(64)), "jpg")
        reasons.add(str(caught.value))
    assert reasons == {"cannot be decoded as jpg (none of PNG, WEBP, JPEG)"}


@pytest.mark.parametrize(("codec", "extension"), CODECS.items())
def test_the_content_determines_the_extension(codec: str, extension: str) -> None:
    assert content_extension(encode(photograph(), codec)[1]) == extension
    with pytest.raises(DataError, match="neither JPEG, PNG, WebP nor"):
        content_extension(b"RIFF1234WAVE")


def published_crop(image: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    """The last step of the published routine. It resizes the whole picture, of any length."""
    picture = Image.fromarray(image)
    scale = size / min(picture.size)
    pixels = np.asarray(picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.BICUBIC))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize(("height", "width", "size"), [(1, 800, 16), (2, 501, 16), (700, 2, 8), (20, 400, 20)])
def test_an_extreme_picture_is_cut_before_it_is_enlarged(
    monkeypatch: pytest.MonkeyPatch, height: int, width: int, size: int
) -> None:
    """The pixels stay the same, but no scaled picture of many times the crop's size is made."""
    image = synthetic(height, width)
    expected = published_crop(image, size)
    sides = []
    resize = Image.Image.resize

    def noted(picture: Image.Image, wanted: tuple[int, int], *arguments: object) -> Image.Image:
        sides.append(max(wanted))
        return resize(picture, wanted, *arguments)

    monkeypatch.setattr(Image.Image, "resize", noted)
    np.testing.assert_allclose(center_crop(image, size).astype(int), expected, atol=1)
    assert max(sides) <= 16 * size + size


def png_with(kind: bytes, content: bytes, checksum: int | None = None) -> bytes:
    """The photograph as a PNG with one more chunk after its header."""
    data = file_bytes(photograph(), "PNG")
    checksum = zlib.crc32(kind + content) if checksum is None else checksum
    return data[:33] + struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum) + data[33:]


def test_bad_metadata_does_not_make_a_picture_undecodable() -> None:
    """Pillow refuses large texts and profiles. No decoder of pixels reads damaged ones."""
    large = zlib.compress(os.urandom(900_000).hex().encode())
    for kind, content in [
        (b"zTXt", b"workflow\0\0" + large),
        (b"iTXt", b"prompt\0\1\0\0\0" + large),
        (b"iCCP", b"icc\0\0" + large),
        (b"tEXt", b"no end of the keyword"),
    ]:
        np.testing.assert_array_equal(decode(png_with(kind, content), "png"), photograph())
        assert dimensions(png_with(kind, content), "png") == (20, 24)
    np.testing.assert_array_equal(decode(png_with(b"tEXt", b"k\0v", checksum=7), "png"), photograph())
    with pytest.raises(ImageError, match="is a PNG whose header or a chunk with pixels is damaged"):
        decode(png_with(b"PLTE", bytes(3), checksum=7), "png")


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("filler", [b"\0", 5 * b"\0", 40 * b"\0", b"\xff\0" * 3, b"\0\xff" * 3, 40 * b"\xaa"])
def test_filler_before_the_end_of_a_jpeg_is_ignored(filler: bytes, progressive: bool) -> None:
    # The number of leftover bytes that the decoder itself overlooks differs between images.
    for seed in range(8):
        noise = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        data = file_bytes(Image.fromarray(noise), "JPEG", quality=90, progressive=progressive)
        padded = data[:-2] + filler + data[-2:]
        # The file may contain a second picture.
        for behind in (b"", data, b"\xff\xd9"):
            np.testing.assert_array_equal(decode(padded + behind, "jpg"), decode(data, "jpg"))


def test_other_bytes_before_the_end_of_a_jpeg_are_damage() -> None:
    """A flipped bit is noticed because compressed data is left over. Pillow alone would return garbage."""
    data = file_bytes(Image.fromarray(synthetic(64, 64)), "JPEG", quality=90)
    start = data.index(b"\xff\xda") + 14
    said = []
    for at in range(start, len(data) - 20, 7):
        flipped = data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]
        try:
            decode(flipped, "jpg")
        except ImageError as error:
            said.append(re.sub(r"\d+", "N", str(error)))
    assert len(said) > 20
    damaged = [line for line in said if line.startswith("is damaged or padded (Corrupt JPEG data: N extraneous bytes")]
    assert len(damaged) > len(said) / 2
