"""Atomic writes, lock files, and the identity of a file's content."""

import errno
import fcntl
import hashlib
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from jitscale.errors import UserError

# Linux allows 107 bytes for a socket's path; multiprocessing adds /pymp-12345678/listener-12345678 to the folder.
SOCKET_FOLDER_BYTES = 107 - 32
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # errors of file systems without locks


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that gets its name only when it is complete and on disk. An exception removes it.

    A process that is killed leaves a hidden file (`aside_pattern`), which no reader mistakes for the real one.
    """
    aside = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.partial")
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        flush(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def remove_durably(path: Path) -> None:
    """Remove a file, if it exists, so that it stays removed after a power cut."""
    path.unlink(missing_ok=True)
    flush(path.parent)


def flush(path: Path) -> None:
    """Write a file, or a folder's list of names, to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def exclusive(path: Path, what: str) -> Iterator[IO[str]]:
    """Hold the lock file `path`. The kernel releases the lock when the process ends, even if it is killed.

    Yields the open file. Raises a UserError if another process holds the lock (`what` ends the message: the reason to
    refuse), an OSError if the file cannot be created or the file system has no locks.
    """
    with path.open("a+", errors="replace") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read(200).strip() or "another process"
            raise UserError(f"{path.parent}: {owner} is at work there, {what}; wait for it or end it") from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield file


@contextmanager
def exclusive_or_not(path: Path) -> Iterator[bool]:
    """As `exclusive`, but yields whether this process holds the lock. Without file locks, every process gets True.

    Raises an OSError if the file cannot be created.
    """
    with path.open("a+") as file:
        ours = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            ours = False
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield ours


def check_socket_folder() -> None:
    """Raise a UserError if the temporary folder's path is too long for the sockets of worker processes.

    Without this check, PyTorch's loader would wait for its first batch for ever.
    """
    folder = tempfile.gettempdir()
    if (length := len(os.fsencode(folder))) > SOCKET_FOLDER_BYTES:
        limit = f"worker processes need at most {SOCKET_FOLDER_BYTES} bytes, for their sockets"
        raise UserError(f"TMPDIR={folder}: has {length} bytes, but {limit}; set TMPDIR to a shorter path, such as /tmp")


def aside_pattern(name: str) -> str:
    """A glob for the files that killed `atomic_write`s leave next to a file called `name`."""
    return f".{name}.*.partial"


class FileIdentity(NamedTuple):
    """Numbers of which at least one changes when a file is replaced or written to."""

    device: int
    inode: int
    size: int  # bytes
    modified: int  # nanoseconds

    @classmethod
    def of(cls, status: os.stat_result) -> "FileIdentity":
        """The identity of the file with this status."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def sha256_of(path: Path) -> str:
    """The hex digest of the file's content. Raises an OSError if it cannot be read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def with_home(path: str) -> str:
    """`path` with a leading `~` or `~user` replaced by that user's home folder.

    Raises a ValueError that says why if there is no such user.
    """
    found = os.path.expanduser(path) if path.startswith("~") else path
    if found.startswith("~"):
        raise ValueError(f"begins with {Path(path).parts[0]}, and there is no such user")
    return found
