"""Photographs to pack, and tests' ways to start tools/make_shards.py."""

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

from jitscale.data.images import decode
from jitscale.data.manifest import Manifest
from tests.support import ROOT
from tests.support.pictures import file_bytes, noise
from tests.support.tools import Finished, run_tool

RESOLUTION = 16
CLASSES = ["ant", "bee", "cat"]
PER_CLASS = 14
PER_SHARD = 4
TRANSPARENT = 9  # the number of the transparent image in each class
SLOW = ("--samples-per-shard", "2")


def write_tree(folder: Path, *, dirty: bool, size: int = 20) -> Path:
    """Write folders of classes with images.

    One image of each class is transparent; of the dirty ones two are unusable.
    """
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for number in range(PER_CLASS):
            image = noise(label * PER_CLASS + number, size, size + number)
            if number == TRANSPARENT:
                image = np.dstack([image, np.full(image.shape[:2], 255, np.uint8)])
                image[: size // 2, :, 3] = 0
            (folder / name / f"{number:02d}.png").write_bytes(file_bytes(image))
    if dirty:
        (folder / "ant" / "03.png").write_bytes(file_bytes(noise(3))[:100])
        (folder / "cat" / "05.png").write_bytes(b"no image")
        # This image is smaller than the resolution.
        (folder / "bee" / "07.png").write_bytes(file_bytes(noise(5, 8, 9)))
    return folder


def command(source: Path | str, output: Path, *more: str, codec: str = "raw") -> list[str]:
    sizes = ["--resolution", str(RESOLUTION), "--samples-per-shard", str(PER_SHARD), "--workers", "2"]
    tool = [sys.executable, str(ROOT / "tools" / "make_shards.py"), "--input", str(source), "--output", str(output)]
    return [*tool, "--codec", codec, *sizes, *more]


def start(arguments: list[str], python_path: str = str(ROOT)) -> subprocess.Popen[str]:
    """Start the command in a process group of its own, as a shell or a scheduler does."""
    env = {**os.environ, "PYTHONPATH": python_path}
    pipe = subprocess.PIPE
    return subprocess.Popen(arguments, cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """The exit code, the output, and the errors without the progress bar."""
    out, err = process.communicate(timeout=120)
    return process.returncode, out, said(err)


def said(errors: str) -> str:
    """The errors without the progress bar."""
    progress = ("image/s", "s/image")  # A slow machine shows the second unit.
    lines = errors.replace("\x1b[A", "").splitlines()  # The bar moves up a line if a second bar is above it.
    return "\n".join(line for line in lines if not any(word in line for word in progress)).strip()


def alone(source: Path | str, output: Path, *more: str, codec: str = "raw") -> Finished:
    """Run the tool in the test's own process. Other tests prove that any number of processes gives the same bytes."""
    return run_tool("make_shards", *command(source, output, "--workers", "1", *more, codec=codec)[2:])


def packed(source: Path | str, output: Path, *more: str, codec: str = "raw") -> Manifest:
    """The manifest that `alone` wrote without a message."""
    finished = alone(source, output, *more, codec=codec)
    assert (finished.code, said(finished.err)) == (0, "")
    return Manifest.read(output / "manifest.json")


def refused(*arguments: str) -> str:
    """The one-line error of a wrong command."""
    finished = run_tool("make_shards", *arguments[2:])
    errors = said(finished.err)
    assert finished.code == 2, errors
    assert errors.startswith("error: ")
    assert "\n" not in errors
    return errors


def contents(folder: Path) -> dict[str, bytes]:
    """The content of every file below `folder`, including hidden ones, except packing.json, which names the input."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "packing.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def samples(folder: Path) -> dict[int, dict[str, bytes]]:
    """All members of all shards: number of the input -> extension -> content."""
    found: dict[int, dict[str, bytes]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                key, extension = member.name.split(".")
                content = archive.extractfile(member)
                assert content is not None
                found.setdefault(int(key), {})[extension] = content.read()
    return found


def committed(output: Path) -> dict[str, int]:
    """The finished shards and their times of writing."""
    records = output.glob(".packing/shard-*.json")
    tars = [output / f"{record.stem}.tar" for record in records]
    return {tar.name: tar.stat().st_mtime_ns for tar in tars}


def refused_input(*arguments: object) -> str:
    """The one-line error of an input with these options."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        finished = run_tool("make_shards", "--output", output, "--codec", "raw", "--resolution", "8", *arguments)
    (line,) = said(finished.err).splitlines()
    assert finished.code == 2, line
    return line


def images_and_labels(folder: Path) -> tuple[npt.NDArray[np.uint8], list[int | None]]:
    """The pixels, (images, R, R, 3), and labels of raw shards, in the order of the input."""
    found = [sample for _, sample in sorted(samples(folder).items())]
    pixels = np.stack([decode(sample["npy"], "npy") for sample in found])
    return pixels, [int(sample["cls"]) if "cls" in sample else None for sample in found]
