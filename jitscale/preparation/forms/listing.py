"""What lies in a folder."""

import os
from dataclasses import dataclass
from pathlib import Path

from jitscale.errors import data_error
from jitscale.preparation.forms.search import extension_of


@dataclass(frozen=True)
class Listing:
    """What lies in a folder, sorted by name, without hidden files."""

    folder: Path
    folders: list[str]  # names
    files: list[str]  # names

    def paths(self, *extensions: str) -> list[str]:
        """The paths of the files with one of these extensions."""
        return [str(self.folder / name) for name in self.files if extension_of(name) in extensions]


def listing_of(folder: Path) -> Listing:
    """What lies in `folder`. Raises a DataError if it cannot be listed."""
    entries = entries_of(str(folder))
    parts: dict[bool, list[str]] = {True: [], False: []}
    for entry in entries:
        parts[is_folder(entry)].append(entry.name)
    return Listing(folder, parts[True], parts[False])


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is one, or a link to one."""
    with data_error(f"{entry.path}: cannot be looked at", "remove it or correct it"):
        return entry.is_dir()


def entries_of(folder: str) -> list[os.DirEntry[str]]:
    """What is in `folder`, sorted by name, without hidden files."""
    with data_error(f"{folder}: cannot be listed", "make it readable or move it away"), os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
