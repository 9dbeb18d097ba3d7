"""Grey images keep one channel in files, shards and batches."""

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import simplejpeg
from PIL import Image

from jitscale.data.images import CODECS, center_crop, decode, dimensions, encode
from jitscale.data.loader import ShardLoader
from jitscale.data.manifest import Manifest
from jitscale.data.order import EpochOrder
from jitscale.data.passes import read_once
from jitscale.data.shards import ShardSet
from jitscale.errors import DataError
from jitscale.preparation.array_shards import write_shards
from tests.preparation.surveying import defects
from tests.support.pictures import noise


def grey(number: int, height: int = 20, width: int = 24) -> npt.NDArray[np.uint8]:
    return noise(number, height, width)[..., :1]


@pytest.mark.parametrize("codec", CODECS)
def test_a_grey_image_is_encoded_as_a_grey_file(codec: str) -> None:
    image = np.ascontiguousarray(center_crop(grey(1), 16))
    extension, data = encode(image, codec)
    read = decode(data, extension, channels=1)
    if codec == "jpeg":
        smooth = np.tile(np.arange(16, dtype=np.uint8)[:, None, None] * 9, (1, 16, 1))
        extension, data = encode(smooth, codec)
        np.testing.assert_allclose(decode(data, extension, channels=1).astype(int), smooth, atol=2)
        assert simplejpeg.decode_jpeg_header(data)[2] == "Gray"
        read = decode(data, extension, channels=1)
    else:
        np.testing.assert_array_equal(read, image)
    assert read.shape == (16, 16, 1)
    assert dimensions(data, extension) == (16, 16)
    if codec == "png":
        assert Image.open(io.BytesIO(data)).mode == "L"
    np.testing.assert_array_equal(decode(data, extension), np.repeat(read, 3, axis=2))


@pytest.mark.parametrize("codec", ["raw", "png", "webp", "jpeg"])
def test_colours_are_converted_to_luma(codec: str) -> None:
    extension, data = encode(noise(2), codec)
    expected = Image.fromarray(decode(data, extension)).convert("L")
    np.testing.assert_array_equal(decode(data, extension, channels=1)[..., 0], np.asarray(expected))


@pytest.mark.parametrize(("height", "width", "size"), [(97, 131, 32), (20, 24, 30), (9, 400, 8), (16, 16, 16)])
def test_a_grey_crop_equals_one_channel_of_the_coloured_crop(height: int, width: int, size: int) -> None:
    image = grey(3, height, width)
    cropped = center_crop(image, size)
    assert cropped.shape == (size, size, 1)
    np.testing.assert_array_equal(np.repeat(cropped, 3, axis=2), center_crop(np.repeat(image, 3, axis=2), size))


@pytest.mark.parametrize("codec", ["raw", "png", "webp"])
def test_shards_of_either_kind_are_read_with_either_number_of_channels(tmp_path: Path, codec: str) -> None:
    colour = np.stack([noise(number, 8, 8) for number in range(6)])
    write_shards(colour[..., :1], [0] * 6, tmp_path / "grey", codec=codec, samples_per_shard=4)
    write_shards(colour, [0] * 6, tmp_path / "colour", codec=codec, samples_per_shard=4)
    assert [Manifest.read(tmp_path / name / "manifest.json").channels for name in ("grey", "colour")] == [1, 3]
    luma = np.stack([np.asarray(Image.fromarray(image).convert("L"))[..., None] for image in colour])
    expected = {("grey", 1): colour[..., :1], ("colour", 3): colour, ("colour", 1): luma}
    expected["grey", 3] = np.repeat(colour[..., :1], 3, axis=3)
    for (name, channels), images in expected.items():
        shards = ShardSet.open(tmp_path / name, 1, 8, channels=channels)
        stored = 1 if name == "grey" else 3
        caution = shards.caution()
        assert (caution is None) == (stored == channels)
        assert caution is None or f"model.in_channels={stored} reads them as they are" in caution
        in_tars = np.concatenate(list(read_once(shards, range(6), 4, 0)))
        assert in_tars.shape == (6, 8, 8, channels)
        assert sorted(map(bytes, in_tars)) == sorted(map(bytes, images))
        order = EpochOrder(shards.samples_per_shard, seed=0, streams=1, window=1)
        batch = next(iter(ShardLoader(shards, order, 6, 6, 0, 1, 0, 0, pin_memory=False)))
        assert batch.images.shape == (6, 8, 8, channels)
        assert sorted(map(bytes, batch.images.numpy())) == sorted(map(bytes, images))
    assert defects(tmp_path / "grey") == []


def test_the_default_number_of_channels_is_three(tmp_path: Path) -> None:
    write_shards(noise(1, 8, 8)[None, ..., :1], [0], tmp_path)
    assert ShardSet.open(tmp_path, 1).read(0, 0)[0].shape == (8, 8, 3)


def test_images_of_both_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has shape \(8, 8, 3\), the first one \(8, 8, 1\)"):
        write_shards([grey(1, 8, 8), noise(2, 8, 8)], [0, 0], tmp_path)
    with pytest.raises(DataError, match=r"has shape \(8, 8, 2\).*expected uint8 \(height, width, 1 or 3\)"):
        encode(noise(1, 8, 8)[..., :2], "raw")
