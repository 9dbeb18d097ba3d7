"""Remote shards: whole tars on this node's disk, verified, shared by all its processes, bounded in bytes.

    <sha256>.tar                  a complete shard, compared with the manifest before it got this name
    <sha256>.<names>.index.npy    its index; <names> stands for the class names that its labels were read with
    <sha256>.partial              a shard that is being downloaded; as large as the whole from the start
    <sha256>.lock                 held while the shard is downloaded, hashed, scanned or evicted; never deleted. It says
                                  which tar and indexes were verified, and whether the tar was hashed because of a bad
                                  sample; its time is when the shard was last used
    cache.lock                    held while room is made, and while a download gets its name

A tar is trusted while it is the file that was hashed: same inode, size, times of change (which no user can set), for a
day at most. Any other is hashed before a process reads it, by one process of the node, and fetched again if it is not
what the manifest says. An index that no lock file vouches for is scanned again.

Locks are `flock`s: the kernel releases the locks of a killed process. The folder must lie on a disk of this node.
"""

import fcntl
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from jitscale.addresses import masked
from jitscale.data.manifest import ShardRecord
from jitscale.data.remote import WrongContentError, read_in_chunks, retried
from jitscale.data.tar_index import IndexArray, index_tar, map_index, save_array
from jitscale.data.tar_labels import CLS, LabelKey
from jitscale.errors import DataError, data_error
from jitscale.files import sha256_of

logger = logging.getLogger(__name__)

_ROOM_WAIT = 0.2  # seconds between two attempts to make room while others download
_MARK_EVERY = 10.0  # seconds; more often than this a process does not mark a shard as used
_TRUSTED_FOR = 86_400.0  # seconds; what was hashed longer ago is hashed again, since disks decay
_SOUND_FOR = 3_600.0  # seconds; so long no process hashes a copy again because of a bad sample

_TAR, _PARTIAL, _LOCK = ".tar", ".partial", ".lock"
_SUSPECTED = ".suspected"  # no file, but a name in the lock file, for a tar that was hashed because of a bad sample
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CACHED = re.compile(rf"[0-9a-f]{{64}}({re.escape(_TAR)}|{re.escape(_PARTIAL)})")


class ShardCache:
    """Complete and verified copies of remote shards in one folder.

    Any number of processes and threads of one node may use the folder at the same time, through this object or through
    others; the object can be pickled. An evicted tar occupies the disk until the last descriptor of it is closed.

    The folder is made if it is not there. Raises a DataError if it can neither be made nor written.
    """

    def __init__(self, folder: Path, capacity: int) -> None:
        self.capacity = capacity  # bytes that all tars may take, complete or partial; indexes come on top
        self._folder = folder.absolute()
        self._everything_lock = self._folder / "cache.lock"
        self._marked: dict[str, float] = {}  # sha256 to when this process marked the shard as used
        self._trusted: dict[str, list[int]] = {}  # sha256 to the identity of the tar that this process may read
        self._suspected: set[str] = set()  # sha256 of what this process hashed because of a bad sample
        with data_error(f"{folder}: cannot be made as a cache of shards", "choose another folder"):
            self._folder.mkdir(parents=True, exist_ok=True)
        with _locked(self._everything_lock, wait=False):  # a folder that cannot be written is met now
            pass

    def open(self, url: str, record: ShardRecord) -> int:
        """A descriptor of the shard that `record` describes, to be read and closed; raises as `fetch`.

        The shard is fetched if necessary. The descriptor stays good when it is evicted.
        """
        while True:
            self.fetch(url, record)
            try:
                return os.open(self._file(record, _TAR), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                logger.warning("%s: evicted before it was opened; fetching it again", masked(url))

    def fetch(self, url: str, record: ShardRecord) -> None:
        """Make sure that the shard is there, and mark it as used.

        Raises a DataError if it is missing, access is refused, the storage cannot be reached, its content differs from
        `record`, it is larger than the cache, or the disk is full.
        """
        if not self._is_here(record):
            with _locked(self._file(record, _LOCK)):
                self._fetch_locked(url, record)

    def copy_of(self, record: ShardRecord) -> Path:
        """The file that is the shard's copy, if there is one."""
        return self._file(record, _TAR)

    def evict_if_damaged(self, url: str, record: ShardRecord) -> bool:
        """Hash the copy, of which a sample is bad, and remove it if it is damaged; returns whether it was.

        What is bad in a sound copy is bad in the storage too: a process does so once for each shard, and the processes
        of a node once an hour.
        """
        if record.sha256 in self._suspected:
            return False
        self._suspected.add(record.sha256)
        with _locked(self._file(record, _LOCK)):
            self._trusted.pop(record.sha256, None)
            path, suspected = self._file(record, _TAR), self._file(record, _SUSPECTED)
            if self._is_vouched_for(record, suspected, _identity(path), _SOUND_FOR):
                return False
            if self._is_verified(url, record):
                with suppress(OSError):  # a full disk: another process hashes the copy again
                    self._vouch(record, suspected, _identity(path))
                return False
            path.unlink(missing_ok=True)
        return True

    def index(self, url: str, record: ShardRecord, class_names: list[str] | None, key: LabelKey = CLS) -> IndexArray:
        """The shard's index; one process fetches the shard if necessary, and scans. See `fetch` and `index_tar`."""
        meaning = hashlib.sha256(json.dumps([class_names, str(key)]).encode()).hexdigest()[:8]
        path = self._file(record, f".{meaning}.index.npy")
        index = self._load_index(path, record)
        if index is not None:
            return index
        with _locked(self._file(record, _LOCK)):
            index = self._load_index(path, record)
            if index is None:
                self._fetch_locked(url, record)
                try:
                    index = index_tar(self._file(record, _TAR), key, class_names)
                except DataError as error:
                    raise DataError(f"{url}: cannot be indexed; its copy {error}") from error
                with self._writing(url, index.nbytes):
                    save_array(path, index)
                    self._vouch(record, path, _identity(path))
        return index

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_marked": {}}  # by this process's clock

    def _file(self, record: ShardRecord, suffix: str) -> Path:
        if not _SHA256.fullmatch(str(record.sha256)):  # a damaged manifest must not choose the names of files
            raise DataError(f"{record.name}: has {record.sha256!r} as its sha256; write the manifest again")
        return self._folder / f"{record.sha256}{suffix}"

    def _load_index(self, path: Path, record: ShardRecord) -> IndexArray | None:
        """The index in the file; None if there is none, it is damaged, or nothing vouches for it."""
        identity = _identity(path)
        if identity is None:
            return None
        if not self._is_vouched_for(record, path, identity):
            logger.warning("%s: was not written by this cache, or long ago; scanning the shard again", path)
            return None
        try:
            index = map_index(path)
            if len(index) == record.samples:
                return index
            wrong = f"{path}: holds {len(index)} samples, the shard {record.samples}"
        except DataError as error:
            wrong = str(error).partition(";")[0]
        logger.warning("%s; scanning the shard again", wrong)
        return None

    def _is_here(self, record: ShardRecord) -> bool:
        """Whether the complete tar is there, and the file that was verified; any other does not count."""
        path = self._file(record, _TAR)
        found = _identity(path)
        if found is None or found[1] != record.bytes:
            return False
        if self._trusted.get(record.sha256) != found:
            if not self._is_vouched_for(record, path, found):
                return False
            self._trusted[record.sha256] = found
        now = time.monotonic()
        if now - self._marked.get(record.sha256, -_MARK_EVERY) >= _MARK_EVERY:
            self._marked[record.sha256] = now
            with suppress(FileNotFoundError):  # somebody removed the lock
                os.utime(self._file(record, _LOCK))
        return True

    def _is_vouched_for(
        self, record: ShardRecord, path: Path, identity: list[int] | None, seconds: float = _TRUSTED_FOR
    ) -> bool:
        """Whether `path` is what the shard's lock file says was verified, at most so many `seconds` ago."""
        known, hashed = self._verified(record).get(path.name, ([], 0.0))
        return known == identity and 0 <= time.time() - hashed < seconds

    def _verified(self, record: ShardRecord) -> dict[str, tuple[list[int], float]]:
        """File name to identity and time of verification, as the lock file says; empty if it is new or damaged."""
        try:
            content = json.loads(self._file(record, _LOCK).read_text())
            return {name: (list(known), float(when)) for name, (known, when) in content.items()}
        except (OSError, ValueError, TypeError, AttributeError, RecursionError, OverflowError):
            return {}

    def _vouch(self, record: ShardRecord, path: Path, identity: list[int] | None) -> None:
        """Note that the file `path` with this identity is verified. The shard's lock is held."""
        verified = {**self._verified(record), path.name: (identity, time.time())}
        self._file(record, _LOCK).write_text(json.dumps(verified))

    def _is_verified(self, url: str, record: ShardRecord) -> bool:
        """Hash the copy; False if there is none, or it is damaged, which is logged. The shard's lock is held."""
        path = self._file(record, _TAR)
        found, wrong = _identity(path), "is not what the manifest says"
        if found is None:
            return False
        try:
            if found[1] == record.bytes and sha256_of(path) == record.sha256:
                with suppress(OSError):  # a full disk: another process hashes the sound copy again
                    self._vouch(record, path, found)
                self._trusted[record.sha256] = found
                return True
        except OSError as error:
            wrong = f"cannot be read ({error})"
        logger.warning("%s: its copy %s %s; fetching it again", masked(url), path, wrong)
        return False

    def _fetch_locked(self, url: str, record: ShardRecord) -> None:
        """`fetch`, while the shard's lock is held."""
        if self._is_here(record) or self._is_verified(url, record):
            return
        if record.bytes > self.capacity:
            what = f"has {record.bytes} bytes, the cache {self._folder} holds {self.capacity}"
            remedy = f"raise data.cache_gb to {record.bytes / 1e9:.3g} and more for other shards, or write smaller ones"
            raise DataError(f"{url}: {what}; {remedy}")
        tar, partial = self._file(record, _TAR), self._file(record, _PARTIAL)
        start = time.monotonic()
        with self._writing(url, record.bytes):
            tar.unlink(missing_ok=True)
            partial.unlink(missing_ok=True)  # a killed process left it; it must not take room from its successor
            try:
                descriptor = self._reserve(url, record)
                try:
                    retried(url, lambda: self._download(url, record, descriptor))
                    os.fsync(descriptor)  # the name must not outlive a crash that the content did not
                finally:
                    os.close(descriptor)
                with _locked(self._everything_lock):  # a process that sums up the folder must see the file once
                    partial.replace(tar)
                self._vouch(record, tar, _identity(tar))
            finally:
                partial.unlink(missing_ok=True)
        self._marked[record.sha256] = time.monotonic()
        logger.info("%s: fetched %d bytes in %.1f s", masked(url), record.bytes, self._marked[record.sha256] - start)

    def _download(self, url: str, record: ShardRecord, descriptor: int) -> None:
        """One attempt to get the content into a file of its size."""
        os.lseek(descriptor, 0, os.SEEK_SET)
        digest, received = hashlib.sha256(), 0
        for chunk in read_in_chunks(url, record.bytes):
            received += len(chunk)
            if received > record.bytes:
                raise WrongContentError(f"more than {record.bytes} bytes")
            digest.update(chunk)
            with self._writing(url, record.bytes):  # a full disk is not tried again
                _write_all(descriptor, chunk)
        if received != record.bytes:
            raise WrongContentError(f"{received} of {record.bytes} bytes")
        if digest.hexdigest() != record.sha256:
            raise WrongContentError(f"sha256 {digest.hexdigest()}, not {record.sha256}")

    def _reserve(self, url: str, record: ShardRecord) -> int:
        """A descriptor of a new partial file that has its full size already, so that others see the room as taken."""
        waiting = False
        while True:
            with _locked(self._everything_lock):
                if self._make_room(record.bytes):
                    path = self._file(record, _PARTIAL)
                    with path.open("wb") as file:
                        file.truncate(record.bytes)
                    return os.open(path, os.O_RDWR | os.O_CLOEXEC)
            if not waiting:
                logger.info("%s: waits for room in %s, which others are downloading into", masked(url), self._folder)
                waiting = True
            time.sleep(_ROOM_WAIT)

    def _make_room(self, needed: int) -> bool:
        """Evict the least recently used tars until `needed` more bytes fit, and say whether they do.

        Files that are not the cache's own are neither counted nor touched. The cache's lock is held.
        """
        files: dict[Path, os.stat_result] = {}
        for path in self._folder.iterdir():
            if _CACHED.fullmatch(path.name):
                with suppress(FileNotFoundError):  # its owner gave up
                    files[path] = path.stat()
        total = sum(status.st_size for status in files.values())
        # Partial files come first. They go in any case, if they have no living owner.
        for path in sorted(files, key=lambda path: (path.suffix == _TAR, _last_used(path))):
            if path.suffix == _TAR and total + needed <= self.capacity:
                break
            if self._remove(path):
                total -= files[path].st_size
        return total + needed <= self.capacity

    def _remove(self, path: Path) -> bool:
        """Delete a shard with its indexes, unless another process is fetching or scanning it and so holds its lock."""
        with _locked(path.with_suffix(_LOCK), wait=False) as held:
            if held:
                logger.debug("%s: removing %s", self._folder, path.name)
                # Its indexes, and the partial ones that a killed process left.
                for file in (path, *self._folder.glob(f"*{path.stem}.*index.npy*")):
                    file.unlink(missing_ok=True)
        return held

    def _writing(self, url: str, needed: int) -> AbstractContextManager[None]:
        """An error of this node's disk, not of the network."""
        what = f"{url}: cannot be written to the cache {self._folder}, where it needs {needed} bytes"
        return data_error(what, "free space there, lower data.cache_gb, or choose another folder")


def _identity(path: Path) -> list[int] | None:
    """What changes with the file: inode, size, times of change; None if it is not there."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _last_used(tar: Path) -> int:
    """When the shard was last used, in nanoseconds; 0 without a lock file."""
    status = _identity(tar.with_suffix(_LOCK))
    return 0 if status is None else status[2]


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


_held: set[int] = set()  # descriptors of locks that threads of this process hold or wait for


@contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock file `path`, made if necessary. Without `wait`, yields False if somebody else holds it.

    Raises a DataError if its folder cannot be written, or does not support locks.
    """
    with data_error(f"{path}: cannot be written", "choose a cache folder that can be"):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    _held.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            got = True
        except BlockingIOError:
            got = False
        except OSError as error:
            raise DataError(f"{path}: cannot be locked ({error}); set data.cache_dir to a local disk") from error
        yield got
    finally:
        # Closing does not release the lock while a process that was forked meanwhile has the descriptor too.
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        _held.discard(descriptor)
        os.close(descriptor)


def _after_fork() -> None:
    """If the parent of a forked process is killed, its child must not go on holding its locks."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_after_fork)
