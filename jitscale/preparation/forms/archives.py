"""Zips and tars as trees of files, whose images are read in place."""

import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from jitscale.data.tar_index import OffsetReader
from jitscale.data.tar_members import LOST_LINK
from jitscale.errors import DataError, data_error
from jitscale.preparation.forms.listing import Tree
from jitscale.preparation.forms.search import PICTURES, Found, Search, extension_of
from jitscale.preparation.forms.tars_of_tars import members_within
from jitscale.preparation.sources import Storage

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # magic, lengths of name and extra field: the directory's may differ
_LOCAL_MAGIC = b"PK\x03\x04"
_STORAGES = {zipfile.ZIP_STORED: Storage.BYTES, zipfile.ZIP_DEFLATED: Storage.DEFLATED}
_ENCRYPTED = 1  # bit of a member's flags
_METHODS = {9: "deflate64", zipfile.ZIP_BZIP2: "bzip2", zipfile.ZIP_LZMA: "lzma", 93: "zstd"}
_DAMAGE = (OSError, ValueError, EOFError, zipfile.BadZipFile, NotImplementedError, struct.error)


class Member(NamedTuple):
    """The place of a file's bytes in its archive."""

    offset: int
    size: int  # bytes as stored, maybe compressed
    storage: Storage


@dataclass
class Branch:
    """A folder in an archive; see `Tree`."""

    path: Path  # path of the archive
    inside: str = ""  # the path to this folder; each name ends in a slash
    branches: dict[str, "Branch"] = field(default_factory=dict)
    members: dict[str, Member] = field(default_factory=dict)
    hidden: list[str] = field(default_factory=list)

    @property
    def place(self) -> str:
        return os.path.join(self.path, self.inside).rstrip("/")

    @property
    def folders(self) -> Sequence[str]:
        return sorted(self.branches)

    @property
    def files(self) -> Sequence[str]:
        return sorted(self.members)

    def below(self, name: str) -> "Branch":
        return self.branches[name]

    def path_of(self, name: str) -> str:
        return os.path.join(self.path, self.inside, name)

    def image(self, name: str) -> Found:
        member = self.members[name]
        return Found(
            str(self.path),
            extension_of(name),
            None,
            f"{self.path}: byte {member.offset}",
            member.offset,
            member.size,
            member.storage,
        )

    def read(self, name: str, most: int) -> bytes:
        offset, size, storage = self.members[name]
        with data_error(f"{self.path_of(name)}: cannot be read", "copy the archive again", (OSError, zlib.error)):
            file = OffsetReader(self.path)
            if storage == Storage.BYTES:
                return file.read(offset, min(size, most))
            return zlib.decompressobj(-zlib.MAX_WBITS).decompress(file.read(offset, size), most)


def tree_of_zip(path: Path) -> Branch:
    """The files of a zip. Raises a DataError if it is damaged, or a file is encrypted or of an unread compression."""
    return _tree(path, _members_of_zip(path))


def tree_of_tar(search: Search, path: Path) -> Branch:
    """The files of a tar. Raises a DataError if it is damaged."""

    def members() -> Iterator[tuple[str, Member]]:
        with path.open("rb") as file:
            for member, content in members_within(file, path, 0, os.fstat(file.fileno()).st_size):
                if content is None:
                    search.ignored[extension_of(member.name) + LOST_LINK] += 1
                else:
                    yield member.name, Member(content.offset_data, content.size, Storage.BYTES)

    return _tree(path, members())


def unwrapped(search: Search, tree: Tree) -> Tree:
    """The folder around everything, which archives often have; without one, `tree` itself.

    If the user names a file of labels, `tree` stays: the file has the paths of the whole archive.
    """
    if search.options.labels not in (None, "none", "folders"):
        return tree
    while len(tree.folders) == 1 and not any(map(_says_something, tree.files)):
        inner = tree.below(tree.folders[0])
        if any(extension_of(name) in PICTURES for name in inner.files):
            if search.options.labels == "folders":
                return tree
            search.note(f"{tree.place}: the folder {tree.folders[0]} holds all images, so it is no class")
        tree = inner
    return tree


def _says_something(name: str) -> bool:
    return extension_of(name) in (*PICTURES, "npy", "json", "jsonl", "csv", "tsv", "parquet")


def _tree(path: Path, members: Iterable[tuple[str, Member]]) -> Branch:
    root = Branch(path)
    for name, member in members:
        *folders, base = [part for part in name.split("/") if part not in ("", ".")] or [""]
        branch, is_hidden = root, not base or base.startswith(".")
        for folder in folders:
            if folder.startswith(".") or folder == "__MACOSX":  # macOS stores no content there
                is_hidden = True
                if folder not in branch.hidden:
                    branch.hidden.append(folder)
                break
            branch = branch.branches.setdefault(folder, Branch(path, f"{branch.inside}{folder}/"))
        if is_hidden:
            continue
        if base in branch.members:
            raise DataError(f"{branch.path_of(base)}: is there twice; write the archive again")
        branch.members[base] = member
    return root


def _members_of_zip(path: Path) -> Iterator[tuple[str, Member]]:
    with data_error(f"{path}: cannot be read as a zip", "copy it again", _DAMAGE), zipfile.ZipFile(path) as archive:
        directory = archive.infolist()
    file = OffsetReader(path)
    for info in directory:
        if info.is_dir():
            continue
        if info.flag_bits & _ENCRYPTED:
            raise DataError(f"{path}: {info.filename} is encrypted; unzip it with its password, and give the folder")
        if info.compress_type not in _STORAGES:
            method = _METHODS.get(info.compress_type, f"method {info.compress_type}")
            remedy = "write the zip again with zip -0, which does not compress"
            raise DataError(f"{path}: {info.filename} is compressed by {method}, which is not read; {remedy}")
        with data_error(f"{path}: byte {info.header_offset}: no header of {info.filename}", "copy the zip again"):
            header = file.read(info.header_offset, _LOCAL_HEADER.size)
        magic, name, extra = _LOCAL_HEADER.unpack(header)
        if magic != _LOCAL_MAGIC:
            raise DataError(f"{path}: byte {info.header_offset}: no header of {info.filename}; copy the zip again")
        offset = info.header_offset + _LOCAL_HEADER.size + name + extra
        yield info.filename, Member(offset, info.compress_size, _STORAGES[info.compress_type])
