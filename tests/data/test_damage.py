"""A collection of damaged shards.

Each case has one outcome, and docs/data.md states that outcome under the same name.
"""

import errno
import gzip
import io
import json
import os
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from jitscale.data.images import ImageError, encode
from jitscale.data.shards import ShardSet
from jitscale.data.tar_index import scan_tar
from jitscale.errors import DataError, StorageError
from jitscale.preparation.array_shards import write_shards
from tests.support import ROOT
from tests.support.pictures import file_bytes, write_tar

CLASSES, SIZE = 10, 16
DOCUMENT = ROOT / "docs/data.md"


def picture(height: int = SIZE, width: int = SIZE) -> npt.NDArray[np.uint8]:
    """Smooth colours, which JPEG changes little."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 9 % 256, columns * 9 % 256, (rows + columns) * 4 % 256], axis=-1).astype(np.uint8)


RGB = Image.fromarray(picture())
PALETTE = RGB.quantize(256)
TURNED = b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0"  # orientation 6: turned by 90 degrees
PNG = file_bytes(RGB, "PNG")
LARGE_JPEG = file_bytes(Image.fromarray(picture(64, 64)), "JPEG", quality=95)


def corrupt_middle(data: bytes) -> bytes:
    """Replace bytes in the middle of the compressed pixels by bytes that no Huffman code contains."""
    middle = len(data) // 2
    return data[:middle] + bytes([0xFF, 0x00] * 8) + data[middle + 16 :]


def png_of(width: int, height: int) -> bytes:
    """A black PNG of any size, made without holding its pixels in memory."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    row = bytes(1 + width // 8)
    body = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def jpeg_that_claims(height: int, width: int) -> bytes:
    """A small JPEG whose frame header states other values."""
    start = LARGE_JPEG.index(b"\xff\xc0") + 5
    return LARGE_JPEG[:start] + struct.pack(">HH", height, width) + LARGE_JPEG[start + 4 :]


def damaged_pax(*members: tuple[str, bytes]) -> bytes:
    """Pax headers that declare sparse members, with an invalid map."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.pax_headers = {"GNU.sparse.map": "none"}
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def damaged_palette() -> bytes:
    """A PNG with a transparent colour whose palette chunk has another name. All checksums are right."""
    data = file_bytes(PALETTE, "PNG", transparency=0)
    start = data.index(b"PLTE") - 4
    (length,) = struct.unpack_from(">I", data, start)
    body = b"PLTd" + data[start + 8 : start + 8 + length]
    chunk = struct.pack(">I", length) + body + struct.pack(">I", zlib.crc32(body))
    return data[:start] + chunk + data[start + 12 + length :]


def damaged_npy() -> bytes:
    """The header has a list where numpy's parser expects a name."""
    data = encode(picture(), "raw")[1]
    return data.replace(b"'descr': '|u1'", b"'descr': [|u1'")


# Half of the picture is transparent; in PALETTE one colour is.
CUT_OUT = np.dstack([picture(), np.repeat(np.uint8([255, 0]), SIZE * SIZE // 2).reshape(SIZE, SIZE)])
CUT_OUT_OVER_WHITE = np.where(CUT_OUT[..., 3:] == 0, np.uint8(255), picture())
PALETTE_OVER_WHITE = np.where(np.asarray(PALETTE)[..., None] == 0, 255, np.asarray(PALETTE.convert("RGB")))


@dataclass(frozen=True)
class Case:
    """A folder that a user might set as `data.shards`, and its outcome."""

    name: str
    build: Callable[[Path], object]  # writes into an empty folder
    refused: str | None = None  # the message of the refusal at the start; None: the shards open
    replaced: str | None = None  # the reason why sample 0 is replaced by another one; None: it is read
    pixels: npt.NDArray[np.uint8] | None = None  # the pixels of sample 0, within the tolerance of its codec


def shards(*members: tuple[str, bytes]) -> Callable[[Path], object]:
    return lambda folder: write_tar(folder / "a.tar", *members)


def rewritten(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    def build(folder: Path) -> None:
        write_tar(folder / "a.tar", *PAIR)
        (folder / "a.tar").write_bytes(change((folder / "a.tar").read_bytes()))

    return build


def image(data: bytes, extension: str) -> Callable[[Path], object]:
    """The damaged image comes first, then a sound one, from which the image size of the set is read."""
    return shards((f"a.{extension}", data), ("a.cls", b"1"), ("b.png", PNG), ("b.cls", b"2"))


def lying(change: Callable[[dict[str, object]], object]) -> Callable[[Path], object]:
    """Our own shards with a changed manifest."""

    def build(folder: Path) -> None:
        write_shards(np.stack([picture()] * 6), [1] * 6, folder, samples_per_shard=4)
        manifest = json.loads((folder / "manifest.json").read_text())
        change(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return build


PAIR = (("k.png", PNG), ("k.cls", b"1"))
SECOND = 512 + -(-len(PNG) // 512) * 512  # the offset of the second member's header

CASES = [
    # Tars
    Case("tar without bytes", rewritten(lambda data: b""), r"a.tar: is empty \(0 bytes\); copy or write it again"),
    Case("gzipped tar", rewritten(gzip.compress), r"byte 0: is compressed with gzip.*gunzip it"),
    Case("tar cut at a member", rewritten(lambda d: d[:SECOND]), rf"ends at byte {SECOND} without an end-of-archive"),
    Case(
        "tar cut inside a member",
        rewritten(lambda d: d[: SECOND - 100]),
        rf"ends at byte {SECOND - 100}, without an end-of-archive block",
    ),
    Case(
        "tar cut in a header",
        rewritten(lambda d: d[: SECOND + 100]),
        rf"ends at byte {SECOND + 100}.* without an end-of-archive block",
    ),
    Case(
        "tar without end block",
        rewritten(lambda d: d[: SECOND + 1024]),
        rf"ends at byte {SECOND + 1024} without an end-of-archive block",
    ),
    Case(
        "tar with half an end block",
        rewritten(lambda d: d[: SECOND + 1536]),
        rf"ends at byte {SECOND + 1536} without an end-of-archive block",
    ),
    Case(
        "flipped bit in a header",
        rewritten(lambda d: d[:SECOND] + bytes([d[SECOND] ^ 1]) + d[SECOND + 1 :]),
        rf"byte {SECOND}: is neither a tar header nor the end-of-archive block",
    ),
    Case("tar without samples", shards(), "has no samples; remove it"),
    Case("two tars in one file", rewritten(lambda data: data + data), r"byte \d+: data after the end-of-archive block"),
    Case(
        "damaged pax header",
        rewritten(lambda data: damaged_pax(*PAIR)),
        r"a.tar: byte 0: is not a complete tar \(invalid literal",
    ),
    # Members of tars
    Case("sample without image", shards(PAIR[1]), r"byte 0: sample 'k' has 0 images among \['cls'\]"),
    Case("sample with two images", shards(*PAIR, ("k.jpg", PNG)), r"byte 0: sample 'k' has 2 images among"),
    Case("duplicate key", shards(*PAIR, *PAIR), rf"byte {SECOND + 1024}: key 'k' occurs twice"),
    Case("key that comes back", shards(*PAIR, ("l.png", PNG), ("k.txt", b"")), r"byte \d+: key 'k' occurs twice"),
    Case("dotted key", shards(("v1.0/n.2.png", PNG), ("v1.0/n.png", PNG), ("v1.0/n.cls", b"1")), pixels=picture()),
    Case("label missing", shards(PAIR[0]), r"byte 512: sample 0 has no label, needs one in 0\.\.9"),
    Case(
        "label not a number",
        shards(PAIR[0], ("k.cls", b"cat")),
        rf"byte {SECOND + 512}: k.cls holds 'cat', neither an integer.*name the classes",
    ),
    Case("negative label", shards(PAIR[0], ("k.cls", b"-1")), rf"byte {SECOND + 512}: k.cls holds '-1'"),
    Case(
        "label out of range",
        shards(PAIR[0], ("k.cls", b"10")),
        r"byte 512: sample 0 has label 10, needs one in 0\.\.9; correct model",
    ),
    Case("pickle among the members", shards(*PAIR, ("k.pyd", b"cos\nsystem\n(S'false'\ntR.")), pixels=picture()),
    Case("member that points outside", shards(("../../k.png", PNG), ("../../k.cls", b"1")), pixels=picture()),
    # Images
    Case("no image at all", image(b"not a png", "png"), replaced="cannot be decoded as png"),
    Case("JPEG cut", image(LARGE_JPEG[:-40], "jpg"), replaced="cannot be decoded as jpg .*[Pp]remature end"),
    Case("JPEG corrupted in the middle", image(corrupt_middle(LARGE_JPEG), "jpg"), replaced="cannot be decoded as jpg"),
    Case("PNG with a damaged palette", image(damaged_palette(), "png"), replaced="has no palette"),
    Case("npy with a damaged header", image(damaged_npy(), "npy"), replaced="cannot be decoded as npy"),
    Case("PNG corrupted in the middle", image(corrupt_middle(PNG), "png"), replaced="cannot be decoded as png"),
    Case("PNG that is called JPEG", image(PNG, "jpg"), pixels=picture()),
    Case("grey", image(file_bytes(RGB.convert("L"), "PNG"), "png"), pixels=np.asarray(RGB.convert("L").convert("RGB"))),
    Case("palette", image(file_bytes(PALETTE, "PNG"), "png"), pixels=np.asarray(PALETTE.convert("RGB"))),
    Case("alpha", image(file_bytes(CUT_OUT), "png"), pixels=CUT_OUT_OVER_WHITE),
    Case(
        "palette with transparent colours", image(file_bytes(PALETTE, transparency=0), "png"), pixels=PALETTE_OVER_WHITE
    ),
    Case("opaque alpha", image(file_bytes(RGB.convert("RGBA")), "png"), pixels=picture()),
    Case(".npy of one channel", image(encode(picture()[..., :1], "raw")[1], "npy"), pixels=picture()[..., [0, 0, 0]]),
    Case("CMYK", image(file_bytes(RGB.convert("CMYK"), "JPEG", quality=100, subsampling=0), "jpg"), pixels=picture()),
    Case(
        "16 bits", image(file_bytes(Image.new("I;16", (16, 16), 999), "PNG"), "png"), replaced="mode I;16; convert it"
    ),
    Case(
        "EXIF-rotated",
        image(
            file_bytes(RGB, "JPEG", quality=100, subsampling=0, exif=TURNED),
            "jpg",
        ),
        pixels=picture(),
    ),
    Case("PNG of 200 megapixels", image(png_of(20_000, 10_000), "png"), replaced="decompression bomb"),
    Case("JPEG of 200 megapixels", image(jpeg_that_claims(10_000, 20_000), "jpg"), replaced="20000 x 10000 pixels"),
    Case("smaller than the image size", image(file_bytes(Image.new("RGB", (9, 20)), "PNG"), "png"), replaced="9 x 20"),
    # Manifests
    Case(
        "manifest whose total is not the sum of its shards",
        lying(lambda m: m["shards"][0].update(samples=3)),
        "have 5 samples, but its",
    ),
    Case(
        "manifest with a wrong number of samples",
        lying(lambda m: (m["shards"][0].update(samples=3), m["shards"][1].update(samples=3))),
        "holds 4 samples, the manifest says 3; write it again",
    ),
    Case(
        "manifest with a wrong number of bytes",
        lying(lambda m: m["shards"][0].update(bytes=1)),
        "bytes, the manifest says 1",
    ),
    Case(
        "manifest with more classes than the model",
        lying(lambda m: m.update(num_classes=11)),
        "says 11 classes, the model has 10",
    ),
    Case(
        "manifest with a resolution below the image size",
        lying(lambda m: m.update(resolution=8)),
        "says 8 pixels per side",
    ),
    Case("manifest that names a lost shard", lying(lambda m: m["shards"][1].update(name="b.tar")), "b.tar: missing"),
    Case(
        "manifest with a folder in the name of a shard",
        lying(lambda m: m["shards"][1].update(name="../b.tar")),
        "names '../b.tar', which is not a file name",
    ),
    Case("manifest that is no JSON", lambda f: (f / "manifest.json").write_text("{"), "cannot be read as a manifest"),
    Case("manifest with wrong types", lying(lambda m: m.update(num_classes="3")), "num_classes is '3'"),
    Case("manifest with an unknown `label_key`", lying(lambda m: m.update(label_key="txt")), "label_key is 'txt'"),
    Case("manifest with an unknown background", lying(lambda m: m.update(background="red")), "background is 'red'"),
    Case("manifest with 2 channels", lying(lambda m: m.update(channels=2)), "channels is 2, not 1 or 3"),
    Case("manifest with a shard without name", lying(lambda m: m["shards"][0].update(name=5)), "a shard's name is 5"),
    Case("manifest with 4.5 samples in a shard", lying(lambda m: m["shards"][0].update(samples=4.5)), "4.5 samples"),
    Case(
        "manifest with too few class names",
        lying(lambda m: m.update(class_names=["a"], num_classes=3)),
        "names 1 classes, but num_classes is 3",
    ),
    Case(
        "manifest with a shard twice",
        lying(lambda m: (m["shards"].append(m["shards"][0]), m.update(total=10))),
        "shard-000000.tar twice; every sample must come once",
    ),
    Case("manifest with a wrong hash", lying(lambda m: m["shards"][0].update(sha256="0" * 64)), pixels=picture()),
]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_damage_has_the_stated_outcome(tmp_path: Path, case: Case) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    case.build(folder)
    before = sorted(tmp_path.rglob("*"))
    if case.refused is not None:
        with pytest.raises(DataError, match=case.refused) as caught:
            ShardSet.open(folder, CLASSES, SIZE)
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)
        return
    opened = ShardSet.open(folder, CLASSES, SIZE)
    if case.replaced is not None:
        with pytest.raises(ImageError, match=case.replaced) as caught:
            opened.read(0, 0)
        assert str(caught.value).startswith(f"{folder}/a.tar: byte 512: sample 0 ")
        assert "\n" not in str(caught.value)
        assert opened.read(0, 1)[1] == 2
    else:
        pixels, label = opened.read(0, 0)
        assert label == 1
        assert case.pixels is not None
        np.testing.assert_allclose(pixels.astype(int), case.pixels, atol=6)
    assert sorted(tmp_path.rglob("*")) == before, "reading writes no file"


def test_the_document_states_every_outcome() -> None:
    rows = [line.split("|") for line in DOCUMENT.read_text().splitlines() if line.startswith("| ")]
    outcomes = {row[1].strip(): row[2].strip() for row in rows if len(row) >= 4}
    for case in CASES:
        kind = "refused" if case.refused else "replaced" if case.replaced else "read"
        assert outcomes.get(case.name, "").startswith(kind), f"{case.name}: {kind}"


def test_failing_storage_of_a_tar_is_not_reported_as_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    number = errno.EIO

    def fail(*arguments: object) -> bytes:
        raise OSError(number, os.strerror(number))

    write_tar(tmp_path / "a.tar", *PAIR)
    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(StorageError, match=r"a.tar: cannot be read \(.*Input/output error\); .* repair the") as met:
        scan_tar(tmp_path / "a.tar")
    assert not met.value.is_wrong
    number = errno.ENOENT
    with pytest.raises(StorageError) as met:
        scan_tar(tmp_path / "a.tar")
    assert met.value.is_wrong
