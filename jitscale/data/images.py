"""One image: encode, decode, crop."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from jitscale.errors import DataError

Pixels = npt.NDArray[np.uint8]

CODECS = {"raw": "npy", "png": "png", "webp": "webp"}  # codec -> extension; all of them lossless
EXTENSIONS = ("npy", "png", "webp", "jpg", "jpeg")  # what is decoded; indexes refer to this order: append only


def encode(image: Pixels, codec: str) -> bytes:
    """A uint8 (H, W, 3) image as the content of a file, losslessly."""
    buffer = io.BytesIO()
    if codec == "raw":
        np.save(buffer, image, allow_pickle=False)
    else:
        settings: dict[str, Any] = {"lossless": True, "method": 0} if codec == "webp" else {}
        Image.fromarray(image).save(buffer, format=codec, **settings)
    return buffer.getvalue()


def decode(content: bytes, extension: str) -> Pixels:
    """The uint8 (H, W, 3) image in a file's `content`.

    Raises:
        DataError: the content is damaged, too large to be an honest image, or not an RGB array.
    """
    try:
        if extension == "npy":
            image = np.load(io.BytesIO(content), allow_pickle=False)
        else:
            image = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"undecodable {extension} image: {error}") from error
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise DataError(f"undecodable {extension} image: {image.dtype} {image.shape}, expected uint8 (H, W, 3)")
    return image


def center_crop(image: Pixels, size: int) -> Pixels:
    """The centred square of an image of at least `size` pixels a side, (size, size, 3).

    ADM's routine (Dhariwal and Nichol 2021): halve with BOX while the short side is at least twice the target, scale
    the short side to the target with BICUBIC, cut the centre.
    """
    picture = Image.fromarray(image)
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    pixels = np.asarray(picture)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]
