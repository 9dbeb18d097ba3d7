"""Finds the tars of a pattern: a folder, a glob or a brace pattern, on this machine or in remote storage."""

import glob
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from braceexpand import braceexpand

from jitscale.addresses import MASK, signs_one_object, split_query
from jitscale.data.manifest import MANIFEST, Manifest
from jitscale.errors import DataError, data_error


@dataclass(frozen=True)
class Tars:
    """Tars of one folder."""

    folder: Path
    paths: list[Path]  # sorted
    manifest: Manifest | None  # the folder's manifest
    whole_folder: bool  # the pattern is the folder, not some of its tars

    def not_in_manifest(self) -> list[Path]:
        """The tars that are missing in the manifest."""
        named = set() if self.manifest is None else {record.name for record in self.manifest.shards}
        return [path for path in self.paths if path.name not in named]


def paths_of(pattern: str) -> list[Path]:
    """The tars in the folder `pattern`, or all files that a glob or brace pattern names, in its order.

    A name without a wildcard is returned even if the file does not exist. Raises a DataError if braces are unbalanced.
    """
    if Path(pattern).is_dir():
        return sorted(Path(pattern).glob("*.tar"))
    names = _expand_braces(pattern)
    return [Path(path) for name in names for path in (sorted(glob.glob(name)) if glob.has_magic(name) else [name])]


def manifests_of(folders: Sequence[Path]) -> dict[Path, Manifest]:
    """The manifests of those `folders` that have one. Raises a DataError if one is damaged."""
    return {folder: Manifest.read(folder / MANIFEST) for folder in folders if (folder / MANIFEST).exists()}


def find_tars(pattern: str) -> Tars:
    """The tars in the folder `pattern`, or those that a glob or brace pattern names, and the manifest of their folder.

    Raises a DataError if there are none, if they are in several folders or in remote storage, or if a name does not end
    in `.tar`.
    """
    if pattern.startswith("pipe:") or "://" in pattern:
        raise DataError(f"{pattern}: is remote, but only local folders are read here; copy them or mount the storage")
    folder, paths = Path(pattern), paths_of(pattern)
    whole_folder = folder.is_dir()
    if not whole_folder:
        folders = sorted({path.parent for path in paths})
        if len(folders) > 1:
            named = f"{len(folders)} folders ({folders[0]}, {folders[1]}, ...)"
            raise DataError(f"{pattern}: names tars in {named}, and each has a manifest of its own; give one at a time")
        folder = folders[0] if folders else folder
        for path in paths:
            if not path.is_file():
                raise DataError(f"{path}: there is no such file or folder; correct the path")
            if path.suffix != ".tar":
                raise DataError(f"{path}: the name does not end in .tar; unpack or rename it, or narrow the pattern")
    manifest = manifests_of([folder]).get(folder)
    if not paths and manifest is None:
        raise DataError(f"{pattern}: no tars here; correct the path")
    return Tars(folder, sorted(set(paths)), manifest, whole_folder)


def find_shards(pattern: str, setting: str) -> tuple[list[Path], dict[Path, Manifest]]:
    """The tars of `pattern`, in order, and the manifests of their folders.

    If the pattern is a folder with a manifest, the manifest lists the tars. `setting` is the setting that holds the
    pattern, for messages. Raises a DataError if the pattern names an unknown storage, no tar, a tar twice, or a tar
    that is missing.
    """
    if scheme := re.match(r"([a-z0-9+]+):", pattern):
        what = "would run a command" if scheme[1] == "pipe" else "is an unknown kind of storage"
        raise DataError(f"{pattern}: {scheme[0]} {what}; give a folder, or an address with s3://, gs:// or https://")
    folder, paths = Path(pattern), paths_of(pattern)
    manifests = manifests_of([folder] if folder.is_dir() else list(dict.fromkeys(path.parent for path in paths)))
    if folder in manifests:
        paths = [folder / record.name for record in manifests[folder].shards]
    if not paths:
        raise DataError(f"{pattern}: no tar shards here; correct {setting} or write them")
    _refuse_repeated(pattern, paths)
    if missing := [path for path in paths if not path.is_file()]:
        lost = f"{len(missing)} of {len(paths)} shards are"
        raise DataError(f"{missing[0]}: missing ({lost}); copy it again or correct {setting}")
    return paths, manifests


def find_remote_shards(pattern: str, setting: str) -> tuple[str, list[str] | None, str]:
    """The address of the folder of remote shards, the names of the shards, and the query of the address.

    If the names are None, all shards of the manifest are meant. The query, such as `?token=...`, is needed for each
    file. `setting` is the setting that holds the pattern, for messages. Raises a DataError if the pattern names several
    folders, has wildcards, names a shard twice, has a masked secret, or is signed for one object.
    """
    if MASK in pattern:
        remedy = f"give {setting}=ADDRESS again, or keep the secret in ~/.netrc"
        raise DataError(f"{pattern}: its secret is masked (stored configs hold no secrets); {remedy}")
    pattern, query = split_query(pattern)
    if signs_one_object(query):
        what = "its signature is valid for one file only, and shards are many files (a manifest and tars)"
        remedy = "give s3:// or gs:// with credentials in the environment, or a token that is valid for the folder"
        raise DataError(f"{pattern}{query}: {what}; {remedy}")
    if not pattern.rstrip("/").endswith(".tar"):
        return pattern.rstrip("/"), None, query
    addresses = _expand_braces(pattern)
    folders = {address.rpartition("/")[0] for address in addresses}
    if len(folders) > 1 or any(glob.has_magic(address) for address in addresses):
        what = "remote shards must be in one folder with a manifest"
        raise DataError(f"{pattern}: {what}; give the folder, or a brace pattern of tars in it")
    _refuse_repeated(pattern, addresses)
    return folders.pop(), [address.rpartition("/")[2] for address in addresses], query


def _expand_braces(pattern: str) -> list[str]:
    with data_error(f"{pattern}: has unbalanced braces", "write for example shard-{000..007}.tar", ValueError):
        return list(braceexpand(pattern))


def _refuse_repeated(pattern: str, names: Sequence[object]) -> None:
    if len(set(names)) < len(names):
        raise DataError(f"{pattern}: names a shard twice; every sample must come once per epoch")
