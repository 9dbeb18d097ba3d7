"""Helpers of the tests of tools that read existing shards."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import webdataset

from jitscale.data.find import find_tars
from jitscale.data.tar_index import index_tar
from jitscale.data.tar_labels import NOWHERE
from jitscale.preparation.survey import Survey, survey
from jitscale.preparation.verification import verify
from tests.support import ROOT
from tests.support.pictures import numbered

NAMES = ["cat", "dog", "bee"]


def theirs(folder: Path, label: Callable[[int], dict[str, Any]], count: int = 10, size: int = 8) -> Path:
    """Write tars of 4 samples with webdataset; returns the folder."""
    folder.mkdir(exist_ok=True)
    with webdataset.ShardWriter(str(folder / "theirs-%03d.tar"), maxcount=4, verbose=0) as writer:
        for number, image in enumerate(numbered(count, size)):
            writer.write({"__key__": f"n{number:04d}", "png": image, **label(number)})
    return folder


def index(folder: Path | str, class_names: list[str] | None = None, workers: int = 1) -> Survey:
    found = survey(find_tars(str(folder)), class_names, workers)
    if not found.defects:
        found.write()
    return found


def defects(folder: Path | str, workers: int = 1) -> list[str]:
    return [str(defect) for defect in verify(find_tars(str(folder)), workers).defects]


def offset(path: Path, row: int) -> int:
    return int(index_tar(path, NOWHERE)[row]["offset"])


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0xFF
    path.write_bytes(data)


def change_manifest(folder: Path, **values: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def tool(name: str, *arguments: str | Path, expect: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"tools/{name}.py", *map(str, arguments)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == expect, finished.stdout + finished.stderr
    return finished
