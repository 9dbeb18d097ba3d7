"""One image between bytes and pixels: the stored forms, and the crop of the recipe.

Shapes: H rows, W columns; an image is uint8 (H, W, 3), RGB.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, UnidentifiedImageError

from jitscale.errors import DataError

UInt8Array = npt.NDArray[np.uint8]

EXTENSIONS = ("npy", "png", "webp", "jpg", "jpeg")  # members of a shard that are read as its images
# The extension of each form that is written. All but jpeg are lossless.
CODECS = {"raw": "npy", "png": "png", "webp": "webp", "jpeg": "jpg"}
MOST_PIXELS = 2 * 89_478_485  # of one image: where Pillow sees a decompression bomb

_PILLOW_FORMATS = ("PNG", "WEBP", "JPEG")  # whatever the name says: ImageNet holds a PNG that is called JPEG
# Method 0 compresses 15 times faster than the default and 10% worse; training needs the decoder's speed only.
_SAVE_OPTIONS: dict[str, dict[str, Any]] = {"png": {}, "webp": {"lossless": True, "method": 0}}
_DEEP_MODES = ("I", "F")  # and I;16 in its byte orders
_JPEG_MAGIC = b"\xff\xd8\xff"
# The first bytes of each form that is no WebP.
_MAGIC = {"jpg": _JPEG_MAGIC, "png": b"\x89PNG\r\n\x1a\n", "npy": np.lib.format.MAGIC_PREFIX}
_JPEG_QUALITY = 95  # 4:4:4; PSNR 40.7 dB on photographs at 256 px


class ImageError(DataError):
    """An image that cannot be decoded. The rest of its shard may be sound."""


def encode(image: UInt8Array, codec: str) -> tuple[str, bytes]:
    """The extension and the bytes of `image` (H, W, 3) as `raw` (numpy's .npy), `png`, lossless `webp` or `jpeg`.

    Raises a DataError at an unknown codec, or an array that is no RGB image.
    """
    if codec not in CODECS:
        raise DataError(f"codec {codec!r}: is unknown; choose one of {', '.join(CODECS)}")
    _check_pixels(image)
    stream = io.BytesIO()
    if codec == "raw":
        np.lib.format.write_array(stream, np.ascontiguousarray(image), allow_pickle=False)
    elif codec == "jpeg":
        pixels = np.ascontiguousarray(image)
        return CODECS[codec], simplejpeg.encode_jpeg(pixels, _JPEG_QUALITY, colorsubsampling="444", fastdct=False)
    else:
        Image.fromarray(image).save(stream, codec, **_SAVE_OPTIONS[codec])
    return CODECS[codec], stream.getvalue()


def decode(data: bytes, extension: str) -> UInt8Array:
    """The image (H, W, 3) in `data`; the array may be read-only. Grey, palette, alpha and CMYK become RGB.

    An EXIF orientation is ignored, as ADM did. Nothing is unpickled. Raises an ImageError at damaged data, at pixels
    that do not fit into 8 bits, or more than `MOST_PIXELS` of them; a DataError at an extension not in `EXTENSIONS`.
    """
    if extension not in EXTENSIONS:
        raise DataError(f"extension {extension!r} is not an image's; expected one of {', '.join(EXTENSIONS)}")
    with _decoding(extension):
        image = _decode_npy(data) if extension == "npy" else _decode_picture(data)
        _check_pixels(image)
    return image


def content_extension(data: bytes) -> str:
    """The extension that fits the first bytes of `data`, not its file's name. Raises an ImageError if none does."""
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "webp"
    for extension, magic in _MAGIC.items():
        if data.startswith(magic):
            return extension
    raise ImageError("is neither JPEG, PNG, WebP nor .npy by its first bytes")


def dimensions(data: bytes, extension: str) -> tuple[int, int]:
    """Width and height in pixels as the header says, without decoding. Raises an ImageError if it cannot be read."""
    with _decoding(extension):
        if extension == "npy":
            height, width, _ = _decode_npy(data).shape
            return width, height
        with Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS) as picture:
            return picture.size


def center_crop(image: UInt8Array, size: int) -> UInt8Array:
    """The central (size, size, 3) of `image` at the scale where its short side is `size`, as ADM crops.

    The image is halved with a box filter while its short side is at least twice the target, then resized by bicubic
    interpolation (arXiv 2105.05233, their image_datasets.py; the JiT recipe uses the same crop). Smaller images are
    enlarged, as in that code.
    """
    if image.shape[:2] == (size, size):
        return image
    picture = Image.fromarray(image)
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    scaled = (round(picture.width * scale), round(picture.height * scale))
    pixels = np.asarray(picture.resize(scaled, Image.Resampling.BICUBIC))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def _decode_npy(data: bytes) -> UInt8Array:
    """A view of `data`: no copy, and nothing allocated on the word of a damaged header."""
    stream = io.BytesIO(data)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ImageError("is an .npy file of another version than 1.0; write it again")
    shape, column_major, dtype = np.lib.format.read_array_header_1_0(stream)
    if column_major or dtype != np.uint8:
        raise ImageError(f"holds {dtype} in {'column' if column_major else 'row'} order; expected uint8 in row order")
    return np.frombuffer(data, np.uint8, offset=stream.tell()).reshape(shape)


def _decode_picture(data: bytes) -> UInt8Array:
    if data.startswith(_JPEG_MAGIC):
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if height * width > MOST_PIXELS:
            raise ImageError(f"has {width} x {height} pixels; the limit is {MOST_PIXELS} in all")
        if colours in ("YCbCr", "Gray"):
            # The same pixels as Pillow's, but damage in the middle is an error, where Pillow returns garbage silently.
            return np.asarray(simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False))
    with Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS) as picture:
        if picture.mode.startswith(_DEEP_MODES):
            # Pillow's conversion would clip: a 16-bit grey image comes out white.
            raise ImageError(f"has pixels of mode {picture.mode}; convert it to 8 bits a channel")
        return np.asarray(picture.convert("RGB"))


@contextmanager
def _decoding(extension: str) -> Iterator[None]:
    """Make an `ImageError` of whatever decoders raise: equal data give equal messages, of one line."""
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError as error:  # Pillow's own text holds an address in memory
        raise ImageError(f"cannot be decoded as {extension} (none of {', '.join(_PILLOW_FORMATS)})") from error
    except Exception as error:  # on damaged data decoders raise anything, also AssertionError and TypeError
        raise ImageError(f"cannot be decoded as {extension} ({' '.join(str(error).split())})") from error


def _check_pixels(image: UInt8Array) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ImageError(f"has shape {image.shape} and type {image.dtype}; expected uint8 (height, width, 3)")
