"""Weights that others have published, identified by hash: downloaded, or read from a folder if there is no network."""

import http.client
import socket
import urllib.error
from dataclasses import dataclass
from pathlib import Path

import torch

from jitscale.config import EvaluationConfig
from jitscale.errors import DataError, data_error
from jitscale.files import sha256_of

ANSWER_SECONDS = 30.0  # a download fails after this time without a byte


@dataclass(frozen=True)
class Published:
    """A file on the web, the beginning of its hash, and its name in tools/fetch_weights.py."""

    url: str
    sha256: str
    name: str = ""

    @property
    def file_name(self) -> str:
        """The file's name, in any folder."""
        return self.url.rsplit("/", maxsplit=1)[-1]

    def remedy(self, folder: Path) -> str:
        """The command that downloads the file into `folder`."""
        return f"on a machine with a network: python tools/fetch_weights.py --output {folder} {self.name}".rstrip()


def published_folder(evaluation: EvaluationConfig) -> Path:
    """`evaluation.features_dir`, or torch hub's folder ($TORCH_HOME/hub/checkpoints)."""
    folder = evaluation.features_dir
    return Path(folder) if folder is not None else Path(torch.hub.get_dir()) / "checkpoints"


def fetch(published: Published, folder: Path) -> Path:
    """Download the file unless it exists, and compare its hash; the file appears whole or not at all.

    Raises a DataError if it cannot be downloaded, has another hash, or if the folder cannot be written.
    """
    path = folder / published.file_name
    if path.exists():
        verify(published, folder)
        return path
    patience = socket.getdefaulttimeout()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(ANSWER_SECONDS)  # in a network that drops packets, urllib would wait for minutes
        torch.hub.download_url_to_file(published.url, str(path), hash_prefix=published.sha256)
    except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
        fault = f"is not there, and cannot be downloaded here ({published.url}: {getattr(error, 'reason', error)})"
        raise DataError(f"{path}: {fault}; {published.remedy(folder)}") from error
    except RuntimeError as error:
        raise DataError(f"{published.url}: not the file with sha256 {published.sha256}... ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error}); choose another folder") from error
    finally:
        socket.setdefaulttimeout(patience)
    return path


def verify(published: Published, folder: Path) -> str:
    """The sha256 of the file in `folder`. Raises a DataError if the file is missing, or has another hash."""
    path = folder / published.file_name
    with data_error(f"{path}: cannot be read", published.remedy(folder)):
        digest = sha256_of(path)
    if not digest.startswith(published.sha256):
        raise DataError(f"{path}: its sha256 begins with {digest[:8]}, expected {published.sha256}; remove it")
    return digest
