"""One image between bytes and pixels: the stored forms, and the crop of the recipe.

Shapes: H rows, W columns, A channels; an image is uint8 (H, W, A), RGB or grey.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, UnidentifiedImageError

from jitscale.config import schema
from jitscale.data.background import OPAQUE, WHITE, Background
from jitscale.errors import DataError

UInt8Array = npt.NDArray[np.uint8]

GREY, RGB = CHANNELS = schema.CHANNELS  # of an image
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
_JPEG_SCAN, _JPEG_END = b"\xff\xda", b"\xff\xd9"
_STORED_FF = b"\xff\0"  # a byte 0xff of a JPEG's code
_FEWEST_FILLERS = 4  # equal bytes before a JPEG's end that are no code
_TRAILING_BYTES = "extraneous bytes before marker 0xd9"  # of libjpeg: left over when all pixels are decoded
_LONGEST_SIDE = 16  # times the short side, of what is resized: ordinary pictures have less
_ANCILLARY = 0x20  # bit of the first letter of a PNG's chunk that holds no pixels
_CHUNK_HEAD, _CHUNK_CHECKSUM = 8, 4  # bytes of a PNG's chunk besides its content
_PNG_DEPTH = 24  # the byte of a PNG that holds the bits of a channel


class ImageError(DataError):
    """An image that cannot be decoded. The rest of its shard may be sound."""


class Decoded(NamedTuple):
    """What a file holds."""

    image: UInt8Array  # (H, W, A); may be read-only
    transparent: bool  # whether the background shows through a pixel, or would if alpha were not dropped


def encode(image: UInt8Array, codec: str) -> tuple[str, bytes]:
    """The extension and the bytes of `image` (H, W, A) as `raw` (numpy's .npy), `png`, lossless `webp` or `jpeg`.

    Grey images become grey files. WebP has no grey: it stores three equal channels, which cost little. Raises a
    DataError at an unknown codec, or an array that is no image.
    """
    if codec not in CODECS:
        raise DataError(f"codec {codec!r}: is unknown; choose one of {', '.join(CODECS)}")
    _check_pixels(image)
    stream = io.BytesIO()
    if codec == "raw":
        np.lib.format.write_array(stream, np.ascontiguousarray(image), allow_pickle=False)
    elif codec == "jpeg":
        space, sampling = ("GRAY", "Gray") if image.shape[2] == GREY else ("RGB", "444")
        pixels = np.ascontiguousarray(image)
        return CODECS[codec], simplejpeg.encode_jpeg(pixels, _JPEG_QUALITY, space, sampling, fastdct=False)
    else:
        _picture_of(image).save(stream, codec, **_SAVE_OPTIONS[codec])
    return CODECS[codec], stream.getvalue()


def decode(data: bytes, extension: str, *, background: Background = WHITE, channels: int = RGB) -> UInt8Array:
    """The image of `decode_file`."""
    return decode_file(data, extension, background=background, channels=channels).image


def decode_file(data: bytes, extension: str, *, background: Background = WHITE, channels: int = RGB) -> Decoded:
    """The image in `data`, with `channels` of `CHANNELS`. Grey, palette and CMYK become RGB.

    Transparent pixels are composited over `background`. Then one channel is the luma of ITU-R 601, as of Pillow's
    mode L, and three of a grey image are equal. An EXIF orientation is ignored, as ADM did. Nothing is unpickled.
    Raises an ImageError at damaged data, at pixels that do not fit into 8 bits, or more than `MOST_PIXELS` of them; a
    DataError at an extension not in `EXTENSIONS`.
    """
    assert channels in CHANNELS
    if extension not in EXTENSIONS:
        raise DataError(f"extension {extension!r} is not an image's; expected one of {', '.join(EXTENSIONS)}")
    with _decoding(extension):
        image, transparent = (_decode_npy(data), False) if extension == "npy" else _decode_picture(data, background)
        _check_pixels(image)
    return Decoded(_with_channels(image, channels), transparent)


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
        with _open_picture(data) as picture:
            return picture.size


def center_crop(image: UInt8Array, size: int) -> UInt8Array:
    """The central (size, size, A) of `image` at the scale where its short side is `size`, as ADM crops.

    The image is halved with a box filter while its short side is at least twice the target, then resized by bicubic
    interpolation (arXiv 2105.05233, their image_datasets.py; the JiT recipe uses the same crop). Smaller images are
    enlarged, as in that code. Of a long side, what lies far outside of the crop is cut off before: enlarged as a whole,
    8000 x 1 pixels would take gigabytes.
    """
    if image.shape[:2] == (size, size):
        return image
    picture = _picture_of(image)
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    left, top = (max(side - _LONGEST_SIDE * min(picture.size), 0) // 2 for side in picture.size)
    if left or top:
        picture = picture.crop((left, top, picture.width - left, picture.height - top))
    scale = size / min(picture.size)
    scaled = (round(picture.width * scale), round(picture.height * scale))
    pixels = _pixels_of(picture.resize(scaled, Image.Resampling.BICUBIC))
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


def _decode_picture(data: bytes, background: Background) -> Decoded:
    if data.startswith(_JPEG_MAGIC):
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if height * width > MOST_PIXELS:
            raise ImageError(f"has {width} x {height} pixels; the limit is {MOST_PIXELS} in all")
        if colours in ("YCbCr", "Gray"):
            return Decoded(_decode_jpeg(data), transparent=False)
    with _open_picture(data) as picture:
        if picture.mode.startswith(_DEEP_MODES):
            # Pillow's conversion would clip: a 16-bit grey image comes out white.
            raise ImageError(f"has pixels of mode {picture.mode}; convert it to 8 bits a channel")
        if picture.mode == "P" and picture.palette is None:
            raise ImageError("has no palette, and pixels that need one; copy it again")
        if not picture.has_transparency_data:
            return Decoded(np.asarray(picture.convert("RGB")), transparent=False)
        pixels = _with_alpha(picture, data)
    image, alpha = np.ascontiguousarray(pixels[..., :RGB]), pixels[..., RGB]
    if alpha.min() == OPAQUE:
        return Decoded(image, transparent=False)
    return Decoded(background.behind(image, alpha), transparent=True)


def _with_alpha(picture: Image.Image, data: bytes) -> UInt8Array:
    """(H, W, 4) of a picture that has alpha or a transparent colour; `data` is its file."""
    if picture.mode in ("L", "RGB") and data.startswith(_MAGIC["png"]):
        # Pillow scales pixels of other depths to 8 bits, but not the transparent colour.
        depth, colour = data[_PNG_DEPTH], picture.info["transparency"]
        if picture.mode == "L" and depth < 8:
            picture.info["transparency"] = colour * (255 // (2**depth - 1))
        elif picture.mode == "RGB" and depth > 8:
            picture.info["transparency"] = tuple(value >> (depth - 8) for value in colour)
    return np.asarray(picture.convert("RGBA"))


def _with_channels(image: UInt8Array, channels: int) -> UInt8Array:
    if image.shape[2] == channels:
        return image
    return np.repeat(image, RGB, axis=2) if channels == RGB else _pixels_of(_picture_of(image).convert("L"))


def _picture_of(image: UInt8Array) -> Image.Image:
    """(H, W, A) as Pillow's picture of mode L or RGB."""
    return Image.fromarray(image[..., 0] if image.shape[2] == GREY else image)


def _pixels_of(picture: Image.Image) -> UInt8Array:
    """Pillow's picture of mode L or RGB as (H, W, A)."""
    pixels = np.asarray(picture)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _decode_jpeg(data: bytes) -> UInt8Array:
    """The same pixels as Pillow's, but damage in the middle is an error, where Pillow returns garbage silently.

    Some cameras write filler bytes before the end marker: they are left away. Other bytes there are refused: nine of
    ten flipped bits that are noticed leave a part of the pixels' code over, and nothing else tells of them.
    """
    try:
        return _rgb(data)
    except ValueError as error:
        if _TRAILING_BYTES not in str(error):
            raise
        for shorter in _without_filler(data):
            with suppress(ValueError):
                return _rgb(shorter)
        what = f"is damaged or padded ({error}): bytes are left when all pixels are decoded"
        raise ImageError(f"{what}; save it again if it looks whole") from error


def _rgb(jpeg: bytes) -> UInt8Array:
    return np.asarray(simplejpeg.decode_jpeg(jpeg, "RGB", fastdct=False, fastupsample=False))


def _without_filler(data: bytes) -> Iterator[bytes]:
    """The JPEG without the zeros and 0xff, or the equal bytes, before its end marker; then with one of them put back.

    The pixels' code itself may end in such a byte; its 0xff is stored as 0xff 0.
    """
    scan = 2
    while scan < len(data) and data[scan : scan + 2] != _JPEG_SCAN:  # a thumbnail has an end marker too
        scan += 2 + int.from_bytes(data[scan + 2 : scan + 4], "big")
    code = data[: max(data.find(_JPEG_END, scan), 0)]
    bare = code.rstrip(b"\0\xff")
    if bare == code and code.endswith(_FEWEST_FILLERS * code[-1:]):
        bare = code.rstrip(code[-1:])
    filler = code[len(bare) :]
    last = _STORED_FF if filler.startswith(_STORED_FF) else filler[:1]
    if filler != last or filler == b"\0":
        yield bare + _JPEG_END
        yield bare + last + _JPEG_END


def _open_picture(data: bytes) -> Image.Image:
    """Pillow's picture, of which the header is read. Raises an ImageError if it is none of `_PILLOW_FORMATS`."""
    is_png = data.startswith(_MAGIC["png"])
    try:
        return Image.open(io.BytesIO(_pixel_chunks(data) if is_png else data), formats=_PILLOW_FORMATS)
    except UnidentifiedImageError as error:
        if not is_png:
            raise
        raise ImageError("is a PNG whose header or a chunk with pixels is damaged; copy it again") from error


def _pixel_chunks(data: bytes) -> bytes:
    """A PNG without its texts, profiles and dates: Pillow refuses the whole picture if one is large or damaged.

    What is no chunk stays, from there on.
    """
    at = len(_MAGIC["png"])
    kept = [data[:at]]
    while len(data) >= at + _CHUNK_HEAD:
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + _CHUNK_HEAD]
        if not kind.isalpha() or kind == b"IEND":
            break
        end = at + _CHUNK_HEAD + length + _CHUNK_CHECKSUM
        if not kind[0] & _ANCILLARY or kind == b"tRNS":  # which is alpha
            kept.append(data[at:end])
        at = end
    return b"".join([*kept, data[at:]])


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
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in CHANNELS or 0 in image.shape:
        raise ImageError(f"has shape {image.shape} and type {image.dtype}; expected uint8 (height, width, 1 or 3)")
