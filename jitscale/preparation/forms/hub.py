"""The Hugging Face hub: data sets at hf://datasets/OWNER/NAME, and its cache on this machine.

Parquet files at an address are read through fsspec when they are needed. Other files must be downloaded first.
"""

import re
from collections import Counter
from functools import partial
from glob import has_magic
from pathlib import Path
from typing import Any

import fsspec

from jitscale.data.remote import retried
from jitscale.data.tar_members import described_kinds
from jitscale.errors import DataError, data_error
from jitscale.preparation.forms.columns import names_of_card
from jitscale.preparation.forms.file_names import files_of_split
from jitscale.preparation.forms.listing import listing_of
from jitscale.preparation.forms.rows import CARD, images_in_rows
from jitscale.preparation.forms.search import Images, Search, extension_of
from jitscale.preparation.sources import Storage

_ADDRESS = re.compile(r"(?P<root>hf://datasets/(?P<name>[\w.-]+/[\w.-]+)(@(refs/convert/\w+|[^/@]+))?)(/.*)?", re.ASCII)
_SNAPSHOTS, _MAIN = "snapshots", Path("refs", "main")  # in the cache's folder of a data set


def images_at_address(search: Search, address: str) -> Images:
    """The images of the Parquet files at `address`: a data set, a folder or a pattern in it, or one file.

    Raises a DataError if it is no address, the hub cannot be reached, or there are no such files.
    """
    found = _ADDRESS.fullmatch(address)
    if found is None:
        raise DataError(
            f"{address}: is no address of a data set; write hf://datasets/OWNER/NAME or .../NAME@REVISION/FOLDER"
        )
    system, path = retried(address, partial(fsspec.core.url_to_fs, address))
    names: list[str] = sorted(retried(address, partial(_names, system, path)))
    files = [f"hf://{name}" for name in names if extension_of(name) == "parquet"]
    if not files:
        kinds = described_kinds(Counter(map(extension_of, names)))
        what = f"holds no Parquet files, but {kinds}" if names else "holds no files"
        download = f"hf download {found['name']} --repo-type dataset --local-dir FOLDER"
        raise DataError(f"{address}: {what}; download it ({download}) and give the folder")
    is_folder = not has_magic(path) and files != [f"hf://{path}"]
    chosen, configuration = files_of_split(search, address, files, whole=is_folder)
    card = f"{found['root']}/{CARD}"
    described = {}
    if retried(card, partial(system.exists, card)):
        with data_error(f"{card}: cannot be read", "correct it on the hub, or download the data", UnicodeDecodeError):
            described = names_of_card(retried(card, partial(system.cat_file, card)).decode(), card, configuration)
    yield from images_in_rows(search, [(file, Storage.PARQUET) for file in chosen], described)


def _names(system: Any, path: str) -> list[str]:
    """The files at `path`. Raises a FileNotFoundError if there are none."""
    found: list[str] = system.glob(path) if has_magic(path) else system.find(path)
    if not found:
        raise FileNotFoundError(path)
    return found


def snapshot_of(folder: Path) -> Path:
    """The data set in `folder`, if that is its folder in the hub's cache, datasets--OWNER--NAME; else `folder`.

    Raises a DataError if the revision is not clear.
    """
    if not (folder / _SNAPSHOTS).is_dir() or not (folder / "blobs").is_dir():
        return folder
    revisions = listing_of(folder / _SNAPSHOTS).folders
    main = (folder / _MAIN).read_text().strip() if (folder / _MAIN).is_file() else ""
    if main in revisions or len(revisions) == 1:
        return folder / _SNAPSHOTS / (main if main in revisions else revisions[0])
    what = f"holds {len(revisions)} revisions, and none of them is main"
    raise DataError(f"{folder}: {what}; give one of them: {folder / _SNAPSHOTS}/REVISION")
