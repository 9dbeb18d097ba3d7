"""The content of a folder, or of an archive as if it were a folder."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from jitscale.errors import DataError, data_error
from jitscale.preparation.forms.search import Found, extension_of


class Tree(Protocol):
    """A folder, or an archive as if it were a folder."""

    @property
    def place(self) -> str:
        """The path of the folder, for a message."""

    @property
    def folders(self) -> Sequence[str]:
        """The names of the folders in it, sorted."""

    @property
    def files(self) -> Sequence[str]:
        """The names of the files in it, sorted."""

    @property
    def hidden(self) -> Sequence[str]:
        """The names of folders that are skipped, in the order in which they are found."""

    def below(self, name: str) -> "Tree":
        """One of the folders. Raises a DataError if it cannot be listed, or is a link to a folder around it."""

    def path_of(self, name: str) -> str:
        """The path of a file or a folder in it, for a message."""

    def image(self, name: str) -> Found:
        """One of the files as an image without a label."""

    def read(self, name: str, most: int) -> bytes:
        """At most `most` bytes of one of the files, from its beginning. Raises a DataError if it cannot be read."""


@dataclass(frozen=True)
class Listing:
    """The content of a folder, sorted by name, without hidden files."""

    folder: Path
    folders: list[str]  # names
    files: list[str]  # names
    hidden: Sequence[str] = ()  # names of folders that are skipped
    above: tuple[str, ...] = ()  # the real paths of the folders that led here

    @property
    def place(self) -> str:
        return str(self.folder)

    def paths(self, *extensions: str) -> list[str]:
        """The paths of the files with one of these extensions."""
        return [str(self.folder / name) for name in self.files if extension_of(name) in extensions]

    def below(self, name: str) -> "Listing":
        path, here = self.path_of(name), os.path.realpath(self.folder)
        real = os.path.realpath(path)
        if os.path.islink(path) and ((here + "/").startswith(real + "/") or real in self.above):
            raise DataError(f"{path}: is a link to a folder around it; remove it")
        return listing_of(Path(path), (*self.above, here))

    def path_of(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def image(self, name: str) -> Found:
        path = self.path_of(name)
        return Found(path, extension_of(name), None, path)

    def read(self, name: str, most: int) -> bytes:
        return beginning_of(self.path_of(name), most)


def listing_of(folder: Path, above: tuple[str, ...] = ()) -> Listing:
    """The content of `folder`. Raises a DataError if it cannot be listed. For `above` see `Listing`."""
    remedy = "make it readable or move it away"
    parts: dict[bool, list[str]] = {True: [], False: []}
    hidden = []
    with data_error(f"{folder}: cannot be listed", remedy), os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            with data_error(f"{entry.path}: cannot be looked at", "remove it or correct it"):
                is_folder = entry.is_dir()
            if not entry.name.startswith("."):
                parts[is_folder].append(entry.name)
            elif is_folder:
                hidden.append(entry.name)
    return Listing(folder, parts[True], parts[False], hidden, above)


def beginning_of(path: str, most: int) -> bytes:
    """At most `most` bytes of the file `path`; none if it is no regular file."""
    if not os.path.isfile(path):
        return b""
    with data_error(f"{path}: cannot be read", "make it readable or move it away"), open(path, "rb") as file:
        return file.read(most)
