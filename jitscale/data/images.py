"""Decoding and encoding of one image, in all stored forms, and the crop of the recipe.

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

GREY, RGB = CHANNELS = schema.CHANNELS  # channels of an image
EXTENSIONS = ("npy", "png", "webp", "jpg", "jpeg")  # extensions of the members of a shard that are its images
# The extension of each codec. All but jpeg are lossless.
CODECS = {"raw": "npy", "png": "png", "webp": "webp", "jpeg": "jpg"}
MOST_PIXELS = 2 * 89_478_485  # limit for one image: Pillow's limit for a decompression bomb

_PILLOW_FORMATS = ("PNG", "WEBP", "JPEG")  # for every extension: ImageNet has a PNG whose name ends in JPEG
# Method 0 compresses 15 times faster than the default, and files are 10% larger. Training needs a fast decoder only.
_SAVE_OPTIONS: dict[str, dict[str, Any]] = {"png": {}, "webp": {"lossless": True, "method": 0}}
_DEEP_MODES = ("I", "F")  # also I;16, I;16B and so on
_JPEG_MAGIC = b"\xff\xd8\xff"
# The first bytes of each form except WebP.
_MAGIC = {"jpg": _JPEG_MAGIC, "png": b"\x89PNG\r\n\x1a\n", "npy": np.lib.format.MAGIC_PREFIX}
_JPEG_QUALITY = 95  # 4:4:4; PSNR 40.7 dB on photographs at 256 px
_JPEG_SCAN, _JPEG_END = b"\xff\xda", b"\xff\xd9"
_STORED_FF = b"\xff\0"  # how a JPEG stores the byte 0xff of its code
_FEWEST_FILLERS = 4  # this many equal bytes before a JPEG's end are filler, not code
_TRAILING_BYTES = "extraneous bytes before marker 0xd9"  # libjpeg's message if bytes are left after the last pixel
_LONGEST_SIDE = 16  # times the short side; a longer picture is cut before it is resized
_ANCILLARY = 0x20  # bit in the first letter of a PNG's chunk without pixels
_CHUNK_HEAD, _CHUNK_CHECKSUM = 8, 4  # bytes of a PNG's chunk, before and after its content
_PNG_DEPTH = 24  # position of the byte with the bits per channel in a PNG


class ImageError(DataError):
    """An image that cannot be decoded. The rest of its shard may be sound."""


class Decoded(NamedTuple):
    """The content of an image file."""

    image: UInt8Array  # (H, W, A); may be read-only
    transparent: bool  # whether a pixel is transparent, even if alpha is discarded


def encode(image: UInt8Array, codec: str) -> tuple[str, bytes]:
    """The extension and the bytes of `image` (H, W, A) as `raw` (numpy's .npy), `png`, lossless `webp` or `jpeg`.

    Grey images become grey files. WebP has no grey form: it stores three equal channels, which cost little. Raises a
    DataError if the codec is unknown, or if the array is not an image.
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
    """The image in `data`, with 1 or 3 `channels`. Palette and CMYK images become RGB first.

    Transparent pixels are composited over `background`. Then a single channel is the luma of ITU-R 601 (Pillow's mode
    L), and the three channels of a grey image are equal. An EXIF orientation is ignored, as in ADM. Nothing is
    unpickled. Raises an ImageError if the data are damaged, if pixels have more than 8 bits per channel, or if there
    are more than `MOST_PIXELS`; a DataError if the extension is not in `EXTENSIONS`.
    """
    assert channels in CHANNELS
    if extension not in EXTENSIONS:
        raise DataError(f"extension {extension!r} is not that of an image; expected one of {', '.join(EXTENSIONS)}")
    with _decoding(extension):
        image, transparent = (_decode_npy(data), False) if extension == "npy" else _decode_picture(data, background)
        _check_pixels(image)
    return Decoded(_with_channels(image, channels), transparent)


def content_extension(data: bytes) -> str:
    """The extension for the first bytes of `data`, whatever its name. Raises an ImageError if no form fits."""
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "webp"
    for extension, magic in _MAGIC.items():
        if data.startswith(magic):
            return extension
    raise ImageError("is neither JPEG, PNG, WebP nor .npy by its first bytes")


def dimensions(data: bytes, extension: str) -> tuple[int, int]:
    """Width and height in pixels, from the header alone. Raises an ImageError if it cannot be read."""
    with _decoding(extension):
        if extension == "npy":
            height, width, _ = _decode_npy(data).shape
            return width, height
        with _open_picture(data) as picture:
            return picture.size


def center_crop(image: UInt8Array, size: int) -> UInt8Array:
    """The central crop (size, size, A) of `image` after it is resized to a short side of `size`, as in ADM.

    The image is halved with a box filter while its short side is at least twice the target, then resized by bicubic
    interpolation (arXiv 2105.05233, their image_datasets.py; the JiT recipe uses the same crop). Smaller images are
    enlarged, as in that code. Very long pictures are cut before they are resized: enlarged as a whole, 8000 x 1 pixels
    would take gigabytes.
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
    """A view of `data`, not a copy. So a damaged header cannot cause a large allocation."""
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
            # Pillow's conversion would clip the values, and a 16-bit grey image would become white.
            raise ImageError(f"has pixels of mode {picture.mode}; convert it to 8 bits a channel")
        if picture.mode == "P" and picture.palette is None:
            raise ImageError("has no palette, but its pixels need one; copy it again")
        if not picture.has_transparency_data:
            return Decoded(np.asarray(picture.convert("RGB")), transparent=False)
        pixels = _with_alpha(picture, data)
    image, alpha = np.ascontiguousarray(pixels[..., :RGB]), pixels[..., RGB]
    if alpha.min() == OPAQUE:
        return Decoded(image, transparent=False)
    return Decoded(background.behind(image, alpha), transparent=True)


def _with_alpha(picture: Image.Image, data: bytes) -> UInt8Array:
    """The RGBA pixels (H, W, 4) of a picture with alpha or a transparent colour; `data` is its file."""
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
    """The pixels (H, W, A) as Pillow's picture of mode L or RGB."""
    return Image.fromarray(image[..., 0] if image.shape[2] == GREY else image)


def _pixels_of(picture: Image.Image) -> UInt8Array:
    """The pixels (H, W, A) of Pillow's picture of mode L or RGB."""
    pixels = np.asarray(picture)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _decode_jpeg(data: bytes) -> UInt8Array:
    """The same pixels as Pillow decodes. But damage in the middle is an error; Pillow returns wrong pixels silently.

    Some cameras write filler bytes before the end marker, and these are ignored. Other bytes there are refused: nine of
    ten flipped bits that are noticed show only by left-over bytes of the pixels' code.
    """
    try:
        return _rgb(data)
    except ValueError as error:
        if _TRAILING_BYTES not in str(error):
            raise
        for shorter in _without_filler(data):
            with suppress(ValueError):
                return _rgb(shorter)
        what = f"is damaged or padded ({error}): bytes are left after the last pixel"
        raise ImageError(f"{what}; save it again if it looks whole") from error


def _rgb(jpeg: bytes) -> UInt8Array:
    return np.asarray(simplejpeg.decode_jpeg(jpeg, "RGB", fastdct=False, fastupsample=False))


def _without_filler(data: bytes) -> Iterator[bytes]:
    """The JPEG without filler (zeros and 0xff, or equal bytes) before its end marker; then with one byte of it kept.

    The code of the pixels may itself end in such a byte. It stores a byte 0xff as 0xff 0.
    """
    scan = 2
    while scan < len(data) and data[scan : scan + 2] != _JPEG_SCAN:  # skips thumbnails, which have an end marker too
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
    """Pillow's picture; only its header is read here. Raises an ImageError if it is not in `_PILLOW_FORMATS`."""
    is_png = data.startswith(_MAGIC["png"])
    try:
        return Image.open(io.BytesIO(_pixel_chunks(data) if is_png else data), formats=_PILLOW_FORMATS)
    except UnidentifiedImageError as error:
        if not is_png:
            raise
        raise ImageError("is a PNG whose header or a chunk with pixels is damaged; copy it again") from error


def _pixel_chunks(data: bytes) -> bytes:
    """The PNG without its texts, profiles and dates: if one of them is large or damaged, Pillow refuses the picture.

    Where no chunk can be recognised, the rest of the data stays as it is.
    """
    at = len(_MAGIC["png"])
    kept = [data[:at]]
    while len(data) >= at + _CHUNK_HEAD:
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + _CHUNK_HEAD]
        if not kind.isalpha() or kind == b"IEND":
            break
        end = at + _CHUNK_HEAD + length + _CHUNK_CHECKSUM
        if not kind[0] & _ANCILLARY or kind == b"tRNS":  # tRNS holds transparency
            kept.append(data[at:end])
        at = end
    return b"".join([*kept, data[at:]])


@contextmanager
def _decoding(extension: str) -> Iterator[None]:
    """Turn every error of a decoder into an `ImageError`. Equal data give equal messages, of one line."""
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError as error:  # Pillow's own message contains an address in memory
        raise ImageError(f"cannot be decoded as {extension} (none of {', '.join(_PILLOW_FORMATS)})") from error
    except Exception as error:  # on damaged data, decoders raise errors of any kind, also AssertionError
        raise ImageError(f"cannot be decoded as {extension} ({' '.join(str(error).split())})") from error


def _check_pixels(image: UInt8Array) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in CHANNELS or 0 in image.shape:
        raise ImageError(f"has shape {image.shape} and type {image.dtype}; expected uint8 (height, width, 1 or 3)")
