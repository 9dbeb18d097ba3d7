"""Images with known pixels, in files and in tars."""

import io
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from jitscale.data.shards import ShardSet


def noise(number: int, height: int = 20, width: int = 24) -> npt.NDArray[np.uint8]:
    """Random pixels, the same for the same number."""
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def numbered(count: int, size: int = 8) -> npt.NDArray[np.uint8]:
    """Images whose pixels state their number: red is number mod 256, green is number div 256."""
    numbers = np.arange(count)
    pixels = np.stack([numbers % 256, numbers // 256, numbers * 0], axis=-1).astype(np.uint8)
    return np.tile(pixels[:, None, None], (1, size, size, 1))


def number_of(image: npt.NDArray[np.uint8]) -> int:
    """The number that the pixels of a `numbered` image state."""
    return int(image[0, 0, 0]) + 256 * int(image[0, 0, 1])


def samples_of(shards: ShardSet) -> list[tuple[int, int]]:
    """Number and label of every sample of shards of `numbered` images, in order."""
    samples = []
    for shard, count in enumerate(shards.samples_per_shard):
        for index in range(count):
            image, label = shards.read(shard, index)
            samples.append((number_of(image), label))
    return samples


def file_bytes(picture: Image.Image | npt.NDArray[np.uint8], form: str = "PNG", **options: object) -> bytes:
    """The picture as a file in Pillow's format `form`."""
    stream = io.BytesIO()
    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    image.save(stream, form, **options)
    return stream.getvalue()


def png_bytes(depth: int, colours: int, row: bytes, *chunks: tuple[bytes, bytes], width: int) -> bytes:
    """A PNG of one row with any bit depth and colour type.

    `chunks` come before its pixels; Pillow writes few of them.
    """
    header = struct.pack(">IIBBBBB", width, 1, depth, colours, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    written = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


def tar_bytes(*members: tuple[str, bytes]) -> bytes:
    """A tar as another program might write it."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def write_tar(path: Path, *members: tuple[str, bytes]) -> Path:
    """Write `tar_bytes`; returns the path."""
    path.write_bytes(tar_bytes(*members))
    return path


def numbered_png(size: int = 8, number: int = 0) -> bytes:
    """An image of `numbered` as a PNG."""
    return file_bytes(numbered(number + 1, size)[number])
