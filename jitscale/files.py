"""Files that are either whole or not there, and what identifies their content."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from jitscale.errors import UserError

NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # what file systems without locks answer


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that gets its name only when it is complete and on disk; an exception leaves nothing behind.

    A process that is killed leaves `aside_pattern(path)`, a hidden file that no reader takes for the real one.
    """
    aside = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.partial")
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        _flush_folder(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def remove_durably(path: Path) -> None:
    """Remove a file, if it is there; it does not come back after a power cut."""
    path.unlink(missing_ok=True)
    _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def exclusive(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path`, which the kernel releases when the process ends, however it ends.

    Raises:
        UserError: another process holds it; `what` says what must not be done twice.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
            raise UserError(f"{path.parent}: {owner} is at work there, {what}; wait for it or end it") from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def exclusive_or_not(path: Path) -> Iterator[bool]:
    """As `exclusive`, but say whether the lock is ours; a file system without locks gives it to everybody.

    Raises:
        OSError: the file cannot be made.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield True
    finally:
        os.close(descriptor)


def aside_pattern(name: str) -> str:
    """A glob for what `atomic_write` leaves beside a file called `name` when its process is killed."""
    return f".{name}.*.partial"


def sha256_of(path: Path) -> str:
    """The hex digest of the file's content.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
