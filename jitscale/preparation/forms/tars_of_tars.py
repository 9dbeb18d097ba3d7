"""Reads a tar inside another tar in place; ImageNet is published so."""

import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from jitscale.data.tar_index import wrong_end
from jitscale.data.tar_members import SPARSE, contents
from jitscale.errors import DataError, data_error


def is_tar_of_tars(path: Path) -> bool:
    """True if the first file in it is a tar. False for a damaged tar: reading it as webdataset's says what is wrong."""
    try:
        with tarfile.open(path, "r:") as tar:
            return next(
                (PurePosixPath(member.name).suffix.lower() == ".tar" for member in tar if member.isreg()), False
            )
    except (OSError, tarfile.TarError, ValueError):
        return False


def members_within(
    file: IO[bytes], path: Path, start: int, size: int
) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarInfo | None]]:
    """The `contents` of the tar in bytes [start, start + size) of `file`. Raises a DataError if it is damaged."""
    end = start + size
    damage = (tarfile.TarError, ValueError)  # ValueError: numbers in pax headers
    file.seek(start)
    with (
        data_error(f"{path}: cannot be read", "start again when the storage works"),
        data_error(f"{path}: bytes {start}..{end}: no whole tar", "copy it again and compare its checksum", damage),
        tarfile.open(fileobj=file, mode="r:") as tar,
    ):
        for member, content in contents(tar):
            if member.offset_data + member.size > end:  # what follows may be a header of the outer tar
                raise tarfile.ReadError("unexpected end of data")
            if content is not None and content.issparse():
                raise DataError(f"{path}: byte {member.offset}: {member.name!r} {SPARSE}")
            yield member, content
        broken = wrong_end(path, file, min(tar.offset, end), end)
    if broken is not None:
        raise DataError(str(broken))
