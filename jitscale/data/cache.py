"""The cache of remote shards: complete, verified tars on this node's disk. All processes of the node share it.

    <sha256>.tar                  a complete shard, compared with the manifest before it gets this name
    <sha256>.<names>.index.npy    its index; <names> is a hash of the class names that give its labels their numbers
    <sha256>.partial              a shard that is being downloaded; it has its final size from the start
    <sha256>.lock                 held while the shard is downloaded, hashed, scanned or evicted; never deleted. It
                                  records which tar and indexes were verified, and whether the tar was hashed because
                                  of a bad sample. Its modification time is the last use of the shard
    cache.lock                    held while tars are evicted, and while a download gets its final name

A tar is trusted for a day while it is the file that was hashed: same inode, size, and times of change (no user can set
these). Any other tar is hashed by one process of the node before a process reads it. If the hash differs from the
manifest, the tar is fetched again. If the lock file does not record an index, the shard is scanned again.

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
_MARK_EVERY = 10.0  # seconds between two marks of a process that a shard is in use
_TRUSTED_FOR = 86_400.0  # seconds until a tar is hashed again, since disks decay
_SOUND_FOR = 3_600.0  # seconds until a copy may be hashed again because of a bad sample

_TAR, _PARTIAL, _LOCK = ".tar", ".partial", ".lock"
_SUSPECTED = ".suspected"  # a name in the lock file, not a file: this tar was hashed because of a bad sample
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CACHED = re.compile(rf"[0-9a-f]{{64}}({re.escape(_TAR)}|{re.escape(_PARTIAL)})")


class ShardCache:
    """Complete and verified copies of remote shards in one folder.

    Any number of processes and threads of one node may use the folder at the same time, through this object or others.
    The object can be pickled. An evicted tar occupies the disk until its last descriptor is closed.

    The folder is created if it does not exist. Raises a DataError if it cannot be created or written.
    """

    def __init__(self, folder: Path, capacity: int) -> None:
        self.capacity = capacity  # bytes for all tars, complete or partial; indexes are not counted
        self._folder = folder.absolute()
        self._everything_lock = self._folder / "cache.lock"
        self._marked: dict[str, float] = {}  # sha256 to the time of this process's last mark
        self._trusted: dict[str, list[int]] = {}  # sha256 to the identity of the tar that this process may read
        self._suspected: set[str] = set()  # sha256 of tars that this process hashed because of a bad sample
        with data_error(f"{folder}: cannot be created as a cache of shards", "choose another folder"):
            self._folder.mkdir(parents=True, exist_ok=True)
        with _locked(self._everything_lock, wait=False):  # fails now if the folder cannot be written
            pass

    def open(self, url: str, record: ShardRecord) -> int:
        """A descriptor of the shard `record`, which the caller must close; raises as `fetch`.

        The shard is fetched if necessary. The descriptor remains valid if the shard is evicted.
        """
        while True:
            self.fetch(url, record)
            try:
                return os.open(self._file(record, _TAR), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                logger.warning("%s: evicted before it was opened; fetching it again", masked(url))

    def fetch(self, url: str, record: ShardRecord) -> None:
        """Fetch the shard unless it is here, and mark it as used.

        Raises a DataError if the shard is missing, access to it is refused, the storage cannot be reached, the content
        differs from `record`, the shard is larger than the cache, or the disk is full.
        """
        if not self._is_here(record):
            with _locked(self._file(record, _LOCK)):
                self._fetch_locked(url, record)

    def copy_of(self, record: ShardRecord) -> Path:
        """The path of the shard's copy, which may not exist."""
        return self._file(record, _TAR)

    def evict_if_damaged(self, url: str, record: ShardRecord) -> bool:
        """Hash the copy after a bad sample, and remove the copy if it is damaged; returns whether it was damaged.

        If the copy is sound, the sample is bad in the storage too. So each process does this once for each shard, and
        all processes of a node together once per hour.
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
                with suppress(OSError):  # if the disk is full, another process hashes the copy again
                    self._vouch(record, suspected, _identity(path))
                return False
            path.unlink(missing_ok=True)
        return True

    def index(self, url: str, record: ShardRecord, class_names: list[str] | None, key: LabelKey = CLS) -> IndexArray:
        """The shard's index. If there is none, one process fetches and scans the shard. See `fetch` and `index_tar`."""
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
        return {**self.__dict__, "_marked": {}}  # other processes have other clocks

    def _file(self, record: ShardRecord, suffix: str) -> Path:
        if not _SHA256.fullmatch(str(record.sha256)):  # a damaged manifest must not choose file names
            raise DataError(f"{record.name}: has {record.sha256!r} as its sha256; write the manifest again")
        return self._folder / f"{record.sha256}{suffix}"

    def _load_index(self, path: Path, record: ShardRecord) -> IndexArray | None:
        """The index in the file; None if it does not exist, is damaged, or the lock file does not record it."""
        identity = _identity(path)
        if identity is None:
            return None
        if not self._is_vouched_for(record, path, identity):
            logger.warning("%s: was not written by this cache, or too long ago; scanning the shard again", path)
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
        """True if the complete tar is here and is the file that was verified."""
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
            with suppress(FileNotFoundError):  # the lock file was removed
                os.utime(self._file(record, _LOCK))
        return True

    def _is_vouched_for(
        self, record: ShardRecord, path: Path, identity: list[int] | None, seconds: float = _TRUSTED_FOR
    ) -> bool:
        """True if the lock file records `path` with this identity as verified in the last `seconds`."""
        known, hashed = self._verified(record).get(path.name, ([], 0.0))
        return known == identity and 0 <= time.time() - hashed < seconds

    def _verified(self, record: ShardRecord) -> dict[str, tuple[list[int], float]]:
        """The lock file's content: file name to identity and time of verification; empty if it is new or damaged."""
        try:
            content = json.loads(self._file(record, _LOCK).read_text())
            return {name: (list(known), float(when)) for name, (known, when) in content.items()}
        except (OSError, ValueError, TypeError, AttributeError, RecursionError, OverflowError):
            return {}

    def _vouch(self, record: ShardRecord, path: Path, identity: list[int] | None) -> None:
        """Record the file `path` with this identity as verified. The caller holds the shard's lock."""
        verified = {**self._verified(record), path.name: (identity, time.time())}
        self._file(record, _LOCK).write_text(json.dumps(verified))

    def _is_verified(self, url: str, record: ShardRecord) -> bool:
        """Hash the copy. False if there is none, or it is damaged, which is logged. The caller holds the lock."""
        path = self._file(record, _TAR)
        found, wrong = _identity(path), "differs from the manifest"
        if found is None:
            return False
        try:
            if found[1] == record.bytes and sha256_of(path) == record.sha256:
                with suppress(OSError):  # if the disk is full, another process hashes the sound copy again
                    self._vouch(record, path, found)
                self._trusted[record.sha256] = found
                return True
        except OSError as error:
            wrong = f"cannot be read ({error})"
        logger.warning("%s: its copy %s %s; fetching it again", masked(url), path, wrong)
        return False

    def _fetch_locked(self, url: str, record: ShardRecord) -> None:
        """`fetch`; the caller holds the shard's lock."""
        if self._is_here(record) or self._is_verified(url, record):
            return
        if record.bytes > self.capacity:
            what = f"has {record.bytes} bytes, but the cache {self._folder} has room for {self.capacity}"
            least = f"{record.bytes / 1e9:.3g} or more (other shards need room too)"
            remedy = f"raise data.cache_gb to {least}, or write smaller ones"
            raise DataError(f"{url}: {what}; {remedy}")
        tar, partial = self._file(record, _TAR), self._file(record, _PARTIAL)
        start = time.monotonic()
        with self._writing(url, record.bytes):
            tar.unlink(missing_ok=True)
            partial.unlink(missing_ok=True)  # left by a killed process; it would occupy room
            try:
                descriptor = self._reserve(url, record)
                try:
                    retried(url, lambda: self._download(url, record, descriptor))
                    os.fsync(descriptor)  # after a crash, the final name must not stand for lost content
                finally:
                    os.close(descriptor)
                with _locked(self._everything_lock):  # another process that sums up the folder must count the file once
                    partial.replace(tar)
                self._vouch(record, tar, _identity(tar))
            finally:
                partial.unlink(missing_ok=True)
        self._marked[record.sha256] = time.monotonic()
        logger.info("%s: fetched %d bytes in %.1f s", masked(url), record.bytes, self._marked[record.sha256] - start)

    def _download(self, url: str, record: ShardRecord, descriptor: int) -> None:
        """One attempt to download the content into the reserved file."""
        os.lseek(descriptor, 0, os.SEEK_SET)
        digest, received = hashlib.sha256(), 0
        for chunk in read_in_chunks(url, record.bytes):
            received += len(chunk)
            if received > record.bytes:
                raise WrongContentError(f"more than {record.bytes} bytes")
            digest.update(chunk)
            with self._writing(url, record.bytes):  # an error of the disk is not retried
                _write_all(descriptor, chunk)
        if received != record.bytes:
            raise WrongContentError(f"{received} of {record.bytes} bytes")
        if digest.hexdigest() != record.sha256:
            raise WrongContentError(f"sha256 {digest.hexdigest()}, not {record.sha256}")

    def _reserve(self, url: str, record: ShardRecord) -> int:
        """A descriptor of a new partial file. It has its final size at once, so that others count the room as used."""
        waiting = False
        while True:
            with _locked(self._everything_lock):
                if self._make_room(record.bytes):
                    path = self._file(record, _PARTIAL)
                    with path.open("wb") as file:
                        file.truncate(record.bytes)
                    return os.open(path, os.O_RDWR | os.O_CLOEXEC)
            if not waiting:
                logger.info("%s: waits for room in %s, where other downloads are running", masked(url), self._folder)
                waiting = True
            time.sleep(_ROOM_WAIT)

    def _make_room(self, needed: int) -> bool:
        """Evict the least recently used tars until `needed` more bytes fit; returns whether they fit.

        Files that do not belong to the cache are neither counted nor removed. The caller holds the cache's lock.
        """
        files: dict[Path, os.stat_result] = {}
        for path in self._folder.iterdir():
            if _CACHED.fullmatch(path.name):
                with suppress(FileNotFoundError):  # its download has failed meanwhile
                    files[path] = path.stat()
        total = sum(status.st_size for status in files.values())
        # Partial files come first. They are always removed, unless a living process holds their lock.
        for path in sorted(files, key=lambda path: (path.suffix == _TAR, _last_used(path))):
            if path.suffix == _TAR and total + needed <= self.capacity:
                break
            if self._remove(path):
                total -= files[path].st_size
        return total + needed <= self.capacity

    def _remove(self, path: Path) -> bool:
        """Delete a shard with its indexes, unless another process holds its lock to fetch or scan it."""
        with _locked(path.with_suffix(_LOCK), wait=False) as held:
            if held:
                logger.debug("%s: removing %s", self._folder, path.name)
                # The pattern includes partial indexes, which a killed process may have left.
                for file in (path, *self._folder.glob(f"*{path.stem}.*index.npy*")):
                    file.unlink(missing_ok=True)
        return held

    def _writing(self, url: str, needed: int) -> AbstractContextManager[None]:
        """Turn errors of this node's disk into a DataError. They are not errors of the network."""
        what = f"{url}: cannot be written to the cache {self._folder} (it needs {needed} bytes)"
        return data_error(what, "free space there, lower data.cache_gb, or choose another folder")


def _identity(path: Path) -> list[int] | None:
    """Inode, size and times of change, which identify the file; None if it does not exist."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _last_used(tar: Path) -> int:
    """The time of the last use of the shard, in nanoseconds; 0 without a lock file."""
    status = _identity(tar.with_suffix(_LOCK))
    return 0 if status is None else status[2]


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


_held: set[int] = set()  # descriptors of locks that threads of this process hold or wait for


@contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock file `path`, which is created if necessary. Without `wait`, yields False if the lock is taken.

    Raises a DataError if its folder cannot be written, or does not support locks.
    """
    with data_error(f"{path}: cannot be written", "choose a writable cache folder"):
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
        # Closing alone would not release the lock if a forked process has inherited the descriptor.
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        _held.discard(descriptor)
        os.close(descriptor)


def _after_fork() -> None:
    """Close inherited locks in a forked process: if its parent is killed, the child must not keep them."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_after_fork)
