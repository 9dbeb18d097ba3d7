"""Weights that others have published, by hash: downloaded where there is a network, read where there is none."""

from __future__ import annotations

import hashlib
import urllib.error
from dataclasses import dataclass
from pathlib import Path

import torch

from jitscale.config import EvaluationConfig
from jitscale.errors import DataError


@dataclass(frozen=True)
class Published:
    """A file on the web.

    Attributes:
        url: where it is; its last part is the file's name.
        sha256: how its hash begins.
    """

    url: str
    sha256: str

    @property
    def file_name(self) -> str:
        """In any folder."""
        return self.url.rsplit("/", maxsplit=1)[-1]


def published_folder(evaluation: EvaluationConfig) -> Path:
    """`evaluation.features_dir`, or torch hub's folder ($TORCH_HOME/hub/checkpoints)."""
    folder = evaluation.features_dir
    return Path(folder) if folder is not None else Path(torch.hub.get_dir()) / "checkpoints"


def fetch(published: Published, folder: Path) -> Path:
    """Download unless it is there, and compare with the hash; the file appears whole or not at all.

    Raises:
        DataError: no network, another content than expected, or the folder cannot be written.
    """
    path = folder / published.file_name
    if path.exists():
        return verify(published, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(published.url, str(path), hash_prefix=published.sha256)
    except urllib.error.URLError as error:
        raise DataError(
            f"{published.url}: {error.reason}; fetch it on a machine with a network (tools/fetch_weights.py) into "
            f"{folder}"
        ) from error
    except RuntimeError as error:
        raise DataError(f"{published.url}: not the file with sha256 {published.sha256}... ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error}); choose another folder") from error
    return path


def verify(published: Published, folder: Path) -> Path:
    """The file in the folder, with the right content.

    Raises:
        DataError: it is missing, or another file.
    """
    path = folder / published.file_name
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}); tools/fetch_weights.py downloads it") from error
    if not digest.startswith(published.sha256):
        raise DataError(f"{path}: its sha256 begins with {digest[:8]}, expected {published.sha256}; remove it")
    return path
