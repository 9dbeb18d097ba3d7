"""Tars, the files next to them, and images."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jitscale.data.images import center_crop, decode
from jitscale.data.shards import ShardSet
from jitscale.preparation.array_shards import write_shards
from tests.support.fuzzing import TEXTS, Command, Fuzzer, Mutator, done, tool
from tests.support.pictures import file_bytes, noise, numbered_png

pytestmark = pytest.mark.slow

NUMBER_FIELDS = [
    (100, 8),
    (108, 8),
    (116, 8),
    (124, 12),
    (136, 12),
    (148, 8),
    (329, 8),
    (345, 155),
    (386, 97),
    (483, 12),
]
NUMBERS = [b"7" * 12, b"-1", b"\xff" * 12, b"\x80" + b"\xff" * 11, b"99999999999", b"", b" ", b"x", b"00000000001\0"]


def archive(mutator: Mutator) -> bytes:
    """A tar of 4 labelled images. Members get other names, types, links, pax headers and sizes."""
    random, stream = mutator.random, io.BytesIO()
    form = random.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    with tarfile.open(fileobj=stream, mode="w", format=form) as tar:
        for number in range(4):
            for name, sound in (
                (f"s{number}.png", numbered_png(8, number)),
                (f"s{number}.cls", str(number % 2).encode()),
            ):
                info, data = tarfile.TarInfo(name), sound
                info.size = len(data)
                if mutator.often(0.03):
                    others = [
                        "s0.png",
                        "../up.png",
                        "/abs/x.png",
                        ".png",
                        "a/../s0.png",
                        "x.json",
                        "README.md",
                        "d/e/f.g.h.cls",
                    ]
                    info.name = random.choice([*others, *TEXTS]).replace("\0", "")[:90] or "x"
                if mutator.often(0.03):
                    info.type = random.choice(b"01234567xgLKSVDNX").to_bytes(1, "big")
                    info.linkname = random.choice(
                        ["s0.png", "s3.png", "../../x", "/dev/zero", "/etc/passwd", info.name]
                    )
                if mutator.often(0.02):
                    keys = ["size", "path", "GNU.sparse.map", "GNU.sparse.major", "GNU.sparse.realsize", "mtime", "uid"]
                    info.pax_headers = {random.choice(keys): mutator.text() for _ in range(random.randint(1, 3))}
                if mutator.often(0.04):
                    data = random.choice(
                        [b"", b"-1", b"99999999999", b"\xff\xfe", b"cat", b"9" * 5000, mutator.changed_bytes(data)]
                    )
                    info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def with_damaged_headers(mutator: Mutator, data: bytes) -> bytes:
    """Some headers get other numbers, mostly with a correct checksum. Then bytes anywhere are changed."""
    random, changed = mutator.random, bytearray(data)
    for _ in range(random.choice([0, 0, 1, 2]) if mutator.active else 0):
        at = 512 * random.randrange(len(changed) // 512)
        start, length = random.choice(NUMBER_FIELDS)
        changed[at + start : at + start + length] = random.choice(NUMBERS)[:length].ljust(length, b"\0")
        if random.random() < 0.8:
            total = sum(changed[at : at + 148]) + 8 * 32 + sum(changed[at + 156 : at + 512])
            changed[at + 148 : at + 156] = b"%06o\0 " % total
    return mutator.changed_bytes(bytes(changed), most=2) if mutator.often(0.3) else bytes(changed)


def opened(pattern: object, classes: int = 2, held_out: float = 0.5) -> Command:
    """Open the shards as training does, hold samples out, and read everything."""

    def read() -> None:
        shards = ShardSet.open(str(pattern), classes, 8).without_fraction(held_out)
        assert shards.held_out is not None
        for part in (shards, shards.held_out):
            for shard, count in enumerate(part.samples_per_shard):
                for index in range(count):
                    part.read(shard, index)

    return done(read)


def test_tars(fuzz: Fuzzer) -> None:
    fuzz.output.mkdir()

    def written(mutator: Mutator) -> Path:
        folder = fuzz.inputs / "tars"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "a.tar").write_bytes(with_damaged_headers(mutator, archive(mutator)))
        if mutator.often(0.3):
            (folder / "b.tar").write_bytes(archive(mutator))
        return folder

    def indexed(mutator: Mutator) -> Command:
        # Indexing writes next to the tars, so the tars lie in the output folder.
        shutil.rmtree(fuzz.output, ignore_errors=True)
        shutil.copytree(written(mutator), fuzz.output)
        if mutator.often(0.3):
            (fuzz.output / "names.txt").write_bytes(mutator.changed_bytes(b"cat\ndog\n"))
            return tool("index_shards", [str(fuzz.output), "--workers=1", f"--class-names={fuzz.output}/names.txt"])
        return tool("index_shards", [str(fuzz.output), "--workers=1", f"--report={fuzz.output}/report.jsonl"])

    def inspected(mutator: Mutator) -> Command:
        sheet = ["--contact-sheet", str(fuzz.output / "a.png")] if mutator.often(0.3) else []
        return tool("inspect_shards", [str(written(mutator)), "--workers=1", "--json", *sheet])

    def packed(mutator: Mutator) -> Command:
        options = ["--resolution=8", f"--codec={mutator.random.choice(['raw', 'png', 'webp', 'jpeg', 'original'])}"]
        return tool(
            "make_shards", ["--input", str(written(mutator)), f"--output={fuzz.output}", "--workers=1", *options]
        )

    fuzz.run("tar: opened and read", 300, lambda mutator: opened(written(mutator)))
    fuzz.run("tar: index_shards", 200, indexed)
    fuzz.run("tar: inspect_shards", 100, inspected)
    fuzz.run("tar: make_shards", 100, packed)
    fuzz.finish()


def array_bytes(mutator: Mutator, array: np.ndarray) -> bytes:
    """An .npy of `array`: with other entries, of another type, or with changed bytes."""
    stream = io.BytesIO()
    if mutator.often(0.3) and array.dtype.names:
        array = array.copy()
        values = [-1, 0, 1, 2**31 - 1, -(2**31), 2**62]
        name = mutator.random.choice(["offset", "size", "label"])
        array[name][mutator.random.randrange(len(array))] = np.int64(mutator.random.choice(values)).astype(
            array.dtype[name]
        )
    elif mutator.often(0.2):
        array = mutator.random.choice(
            [array[:0], array[:3], np.zeros((2, 2)), np.array([None]), np.array("x"), array[None]]
        )
    np.save(stream, array, allow_pickle=True)
    return mutator.changed_bytes(stream.getvalue(), most=2) if mutator.often(0.4) else stream.getvalue()


def test_files_next_to_tars(fuzz: Fuzzer) -> None:
    sound = fuzz.inputs / "sound"
    images = np.stack([noise(number, 8, 8) for number in range(8)])
    write_shards(images, np.arange(8) % 2, sound, samples_per_shard=4, class_names=["cat", "dog"])
    manifest = json.loads((sound / "manifest.json").read_text())

    def written(mutator: Mutator) -> Path:
        folder = fuzz.inputs / "shards"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(sound, folder)
        if not mutator.active:
            return folder
        beside = sorted(folder.glob("*.npy"))
        for _ in range(mutator.random.randint(1, 2)):
            chosen = mutator.random.choice(["manifest", "array", "array"])
            if chosen == "manifest":
                (folder / "manifest.json").write_bytes(mutator.json(manifest))
            else:
                path = mutator.random.choice(beside)
                path.write_bytes(array_bytes(mutator, np.load(sound / path.name)))
        return folder

    def verified(mutator: Mutator) -> Command:
        return tool("index_shards", [str(written(mutator)), "--verify", "--workers=1"])

    fuzz.run("manifest, index, keys: opened and read", 400, lambda mutator: opened(written(mutator)))
    fuzz.run("manifest, index, keys: --verify", 150, verified, reports=True)
    fuzz.finish()


def test_images(fuzz: Fuzzer) -> None:
    picture = Image.fromarray(noise(0, 12, 9))
    stream = io.BytesIO()
    np.save(stream, noise(0, 12, 9))
    forms = {"npy": [stream.getvalue()]}
    forms["png"] = [
        file_bytes(one, "PNG") for one in (picture, picture.convert("L"), picture.quantize(8), picture.convert("RGBA"))
    ]
    forms["jpg"] = [
        file_bytes(one, "JPEG", **more)
        for one in (picture, picture.convert("CMYK"))
        for more in ({}, {"progressive": True})
    ]
    forms["webp"] = [file_bytes(picture, "WEBP", lossless=lossless) for lossless in (True, False)]

    def read(mutator: Mutator) -> Command:
        extension = mutator.random.choice(list(forms))
        data = mutator.changed_bytes(mutator.random.choice(forms[extension]))
        named = mutator.random.choice(list(forms)) if mutator.often(0.1) else extension
        return done(lambda: center_crop(decode(data, named), 8))

    fuzz.run("image", 1000, read)
    fuzz.finish()
