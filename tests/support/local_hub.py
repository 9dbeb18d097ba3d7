"""A local folder that replaces the Hugging Face hub behind fsspec."""

import os
from pathlib import Path
from typing import Any

from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

FOLDER = "JITSCALE_LOCAL_HUB"  # the variable that names the folder
_READ = "JITSCALE_LOCAL_HUB_READ"  # the variable that names a file with the numbers of bytes read


class LocalHub(DirFileSystem):
    """hf://datasets/OWNER/NAME is the folder datasets/OWNER/NAME."""

    protocol = "hf"

    def __init__(self, **options: Any) -> None:
        super().__init__(os.environ[FOLDER], LocalFileSystem(), **options)

    def open(self, path: str, *arguments: Any, **options: Any) -> Any:
        return _Counted(super().open(self._strip_protocol(path), *arguments, **options))

    def cat_file(self, path: str, **options: Any) -> bytes:
        return super().cat_file(self._strip_protocol(path), **options)

    def exists(self, path: str, **options: Any) -> bool:
        return super().exists(self._strip_protocol(path), **options)


class _Counted:
    def __init__(self, file: Any) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._file.read(size)
        if _READ in os.environ:
            with open(os.environ[_READ], "a") as log:
                log.write(f"{len(data)}\n")
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def environment_of(hub: Path, packages: Path) -> dict[str, str]:
    """Variables that make every process find the folder `hub` at hf://. The function fills the folder `packages`.

    fsspec reads the entry points of installed packages, also in worker processes.
    """
    installed = packages / "local_hub-1.0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: local_hub\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[fsspec.specs]\nhf = tests.support.local_hub.LocalHub\n")
    return {FOLDER: str(hub), _READ: str(packages / "read"), "PYTHONPATH": f"{packages}:{os.environ['PYTHONPATH']}"}


def bytes_read(packages: Path) -> int:
    """The number of bytes that all processes have read."""
    return sum(map(int, (packages / "read").read_text().split()))
