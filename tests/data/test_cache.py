"""The cache of remote shards, against a real HTTP server and a real S3 server, from real processes."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import multiprocessing
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.context import ForkContext, SpawnContext
from pathlib import Path

import numpy as np
import pytest

from jitscale.data import cache, remote
from jitscale.data.cache import Prefetcher, ShardCache
from jitscale.data.manifest import ShardRecord
from jitscale.data.remote import is_remote, read_remote
from jitscale.data.tar_index import index_tar
from jitscale.errors import DataError
from tests.support.pictures import tar_bytes
from tests.support.servers import PATIENCE, Storage, record_of

Context = ForkContext | SpawnContext


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    storage = Storage()
    yield storage
    storage.release.set()
    storage.server.shutdown()
    storage.server.server_close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts of this process follow each other at once."""
    monkeypatch.setattr(remote, "_FIRST_WAIT", 0.001)


@pytest.fixture(params=["fork", "spawn"])
def context(request: pytest.FixtureRequest) -> Context:
    return multiprocessing.get_context(request.param)


@pytest.fixture
def fork() -> ForkContext:
    return multiprocessing.get_context("fork")


def content(shards: ShardCache, url: str, record: ShardRecord) -> bytes:
    descriptor = shards.open(url, record)
    try:
        return os.pread(descriptor, record.bytes + 1, 0)
    finally:
        os.close(descriptor)


def names(folder: Path, suffix: str = ".tar") -> set[str]:
    return {path.name for path in folder.iterdir() if path.name.endswith(suffix)}


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def joined(*processes: multiprocessing.process.BaseProcess) -> None:
    for process in processes:
        process.join(PATIENCE)
        if process.is_alive():
            process.kill()
        assert process.exitcode == 0


def waits_for_lock(path: Path) -> bool:
    """Whether somebody waits for the flock, as the kernel tells."""
    inode = f":{path.stat().st_ino} "
    return any("->" in line and inode in line for line in Path("/proc/locks").read_text().splitlines())


# --- what is fetched ---


@pytest.mark.parametrize("pattern", ["s3://bucket/a", "gs://bucket/a", "https://host/a", "http://host/a-{0..3}.tar"])
def test_remote(pattern: str) -> None:
    assert is_remote(pattern)


@pytest.mark.parametrize("pattern", ["/data/shards", "shards", "s3/shards", "ftp://host/a", "file:///a", ""])
def test_not_remote(pattern: str) -> None:
    assert not is_remote(pattern)


def test_content_is_the_servers_and_is_fetched_once(storage: Storage, tmp_path: Path) -> None:
    url, record = storage.shard(size=5_000_000)
    shards = ShardCache(tmp_path / "made" / "for it", 10_000_000)
    descriptor = shards.open(url, record)
    assert os.pread(descriptor, record.bytes + 1, 0) == storage.files[record.name]
    assert fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    assert fcntl.fcntl(descriptor, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    os.close(descriptor)
    assert names(tmp_path / "made" / "for it", "") == {f"{record.sha256}.tar", f"{record.sha256}.lock", "cache.lock"}
    shards.fetch(url, record)
    assert content(pickle.loads(pickle.dumps(shards)), url, record) == storage.files[record.name]
    assert storage.gets == {record.name: 1}


def test_shards_with_equal_names_are_told_apart(storage: Storage, tmp_path: Path) -> None:
    shards = ShardCache(tmp_path, 10_000_000)
    one, other = storage.add("a/shard.tar", b"one" * 1000), storage.add("b/shard.tar", b"other" * 1000)
    assert content(shards, *one) == b"one" * 1000
    assert content(shards, *other) == b"other" * 1000


def test_file_that_was_cut_is_fetched_again(storage: Storage, tmp_path: Path) -> None:
    shards = ShardCache(tmp_path, 500_000)
    url, record = storage.shard()
    shards.fetch(url, record)
    os.truncate(tmp_path / f"{record.sha256}.tar", 1000)
    assert content(shards, url, record) == storage.files[record.name]
    assert storage.gets[record.name] == 2


def _read_in_threads(shards: ShardCache, url: str, record: ShardRecord, expected: str, barrier: object) -> None:
    def read(_: int) -> str:
        barrier.wait(PATIENCE)  # type: ignore[attr-defined]
        return hashlib.sha256(content(shards, url, record)).hexdigest()

    with ThreadPoolExecutor(3) as threads:
        assert set(threads.map(read, range(3))) == {expected}


def test_one_download_for_all_processes_and_threads(storage: Storage, tmp_path: Path, context: Context) -> None:
    url, record = storage.shard(size=4_000_000)
    storage.orders[record.name] = ["slow"]
    barrier = context.Barrier(4 * 3)
    arguments = (ShardCache(tmp_path, 10_000_000), url, record, record.sha256, barrier)
    processes = [context.Process(target=_read_in_threads, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    joined(*processes)
    assert storage.gets == {record.name: 1}


def _fetch(shards: ShardCache, url: str, record: ShardRecord) -> None:
    shards.fetch(url, record)


def test_killed_download_is_never_read_and_its_waiter_takes_over(
    storage: Storage, tmp_path: Path, context: Context
) -> None:
    url, record = storage.shard(size=2_000_000)
    storage.orders[record.name] = ["hold"]
    shards = ShardCache(tmp_path, 3_000_000)  # no room for what was left and for another
    killed = context.Process(target=_fetch, args=(shards, url, record))
    killed.start()
    assert storage.held.acquire(timeout=PATIENCE)
    waiter = context.Process(target=_fetch, args=(shards, url, record))
    waiter.start()
    until(lambda: waits_for_lock(tmp_path / f"{record.sha256}.lock"))
    assert names(tmp_path) == set()
    assert names(tmp_path, ".partial") == {f"{record.sha256}.partial"}
    os.kill(killed.pid or 0, signal.SIGKILL)
    killed.join(PATIENCE)
    joined(waiter)
    assert names(tmp_path, ".partial") == set()
    assert content(shards, url, record) == storage.files[record.name]
    assert storage.gets == {record.name: 2}


def _fetch_and_fork(shards: ShardCache, url: str, record: ShardRecord, reports: object) -> None:
    threading.Thread(target=shards.fetch, args=(url, record)).start()
    reports.recv()  # type: ignore[attr-defined]
    child = os.fork()
    if child == 0:
        time.sleep(2 * PATIENCE)
        os._exit(0)
    reports.send(child)  # type: ignore[attr-defined]


def test_child_of_a_killed_process_does_not_keep_its_locks(storage: Storage, tmp_path: Path, fork: ForkContext) -> None:
    url, record = storage.shard()
    storage.orders[record.name] = ["hold"]
    shards = ShardCache(tmp_path, 400_000)
    ours, theirs = fork.Pipe()
    killed = fork.Process(target=_fetch_and_fork, args=(shards, url, record, theirs))
    killed.start()
    assert storage.held.acquire(timeout=PATIENCE)
    ours.send("fork now")
    child = ours.recv()
    try:
        os.kill(killed.pid or 0, signal.SIGKILL)
        until(lambda: not killed.is_alive())  # `join` would wait for the child too, which has its pipe
        taker = fork.Process(target=_fetch, args=(shards, url, record))
        taker.start()
        joined(taker)
    finally:
        os.kill(child, signal.SIGKILL)


def test_child_does_not_release_its_parents_lock(storage: Storage, tmp_path: Path, fork: ForkContext) -> None:
    url, record = storage.shard()
    storage.orders[record.name] = ["hold"]
    shards = ShardCache(tmp_path, 400_000)
    thread = threading.Thread(target=shards.fetch, args=(url, record))
    thread.start()
    assert storage.held.acquire(timeout=PATIENCE)
    child = fork.Process(target=_fetch, args=(shards, url, record))
    child.start()
    until(lambda: waits_for_lock(tmp_path / f"{record.sha256}.lock"))
    storage.release.set()
    thread.join(PATIENCE)
    joined(child)
    assert storage.gets == {record.name: 1}


def _read_manifest_and_fetch(shards: ShardCache, manifest: str, url: str, record: ShardRecord) -> None:
    assert read_remote(manifest) == b"{}"
    shards.fetch(url, record)


def test_processes_forked_from_one_that_reads_can_read_and_do_not_disturb_it(
    storage: Storage, tmp_path: Path, fork: ForkContext
) -> None:
    manifest, _ = storage.add("manifest.json", b"{}")
    shards = ShardCache(tmp_path, 10_000_000)
    assert read_remote(manifest) == b"{}"  # the event loop runs and keeps a connection
    held, other = storage.shard(1), storage.shard(2)
    storage.orders[held[1].name] = ["hold"]
    thread = threading.Thread(target=shards.fetch, args=held)
    thread.start()
    assert storage.held.acquire(timeout=PATIENCE)  # and a download is running
    children = [fork.Process(target=_read_manifest_and_fetch, args=(shards, manifest, *other)) for _ in range(2)]
    for child in children:
        child.start()
    joined(*children)
    storage.release.set()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert read_remote(manifest) == b"{}"
    assert content(shards, *held) == storage.files[held[1].name]
    assert storage.gets == {"manifest.json": 4, held[1].name: 1, other[1].name: 1}


# --- what fails ---


@pytest.mark.parametrize("order", ["503", "429", "cut", "wrong", "short", "long"])
def test_what_may_pass_is_tried_again_and_logged(
    storage: Storage, tmp_path: Path, impatient: None, caplog: pytest.LogCaptureFixture, order: str
) -> None:
    url, record = storage.shard()
    storage.orders[record.name] = [order, order]
    assert content(ShardCache(tmp_path, 400_000), url, record) == storage.files[record.name]
    assert storage.gets[record.name] == 3
    warnings = [message for message in caplog.messages if url in message and "of 5 failed" in message]
    assert len(warnings) == 2


def test_waits_grow(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", waits.append)
    storage.orders["a"] = ["503"] * 4
    assert read_remote(storage.add("a", b"a")[0]) == b"a"
    assert waits == [0.25, 1, 4, 16]


def test_silent_server_is_left(
    storage: Storage, tmp_path: Path, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_SILENCE_TIMEOUT", 0.3)
    monkeypatch.setattr(remote, "_file_systems", {})
    url, record = storage.shard()
    storage.orders[record.name] = ["hold"]
    assert content(ShardCache(tmp_path, 400_000), url, record) == storage.files[record.name]
    assert storage.gets[record.name] == 2


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ("503", "cannot be read in 5 attempts (ClientResponseError: 503"),
        ("cut", "cannot be read in 5 attempts (ClientPayloadError"),
        ("wrong", "content differs from the manifest (sha256 "),
        ("short", "content differs from the manifest (299999 of 300000 bytes)"),
        ("long", "content differs from the manifest (more than 300000 bytes)"),
    ],
)
def test_what_does_not_pass_is_an_error_that_leaves_nothing(
    storage: Storage, tmp_path: Path, impatient: None, order: str, message: str
) -> None:
    url, record = storage.shard()
    storage.orders[record.name] = [order] * 5
    with pytest.raises(DataError) as caught:
        ShardCache(tmp_path, 400_000).fetch(url, record)
    assert f"{url}: {message}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert storage.gets[record.name] == 5
    assert names(tmp_path, "") == {"cache.lock", f"{record.sha256}.lock"}


@pytest.mark.parametrize(
    ("order", "message"), [("404", "there is no such file"), ("403", "access is refused"), ("410", "refuses it")]
)
def test_what_waiting_does_not_mend_is_tried_once(storage: Storage, tmp_path: Path, order: str, message: str) -> None:
    url, record = storage.shard()
    storage.orders[record.name] = [order] * 2
    with pytest.raises(DataError, match=f"{url}: .*{message}"):
        ShardCache(tmp_path, 400_000).fetch(url, record)
    with pytest.raises(DataError, match=f"{url}: .*{message}"):
        read_remote(url)
    assert storage.gets[record.name] == 2


def test_host_that_cannot_be_reached(impatient: None) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/manifest.json"
        with pytest.raises(DataError, match=f"{url}: cannot be read in 5 attempts .*Connect"):
            read_remote(url)


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(DataError, match=r"gs://bucket/a: .* not installed .* pip install 'jitscale\[gcs\]'"):
        read_remote("gs://bucket/a")


def test_manifest_does_not_choose_file_names(storage: Storage, tmp_path: Path) -> None:
    url, _ = storage.shard()
    for sha256 in ("../../somewhere", "A" * 64, None):
        with pytest.raises(DataError, match="as its sha256"):
            ShardCache(tmp_path, 400_000).fetch(url, ShardRecord("a.tar", 1, 1, sha256))  # type: ignore[arg-type]


def test_folder_that_cannot_be_made_or_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/folder: cannot be made .*choose another"):
        ShardCache(tmp_path / "file" / "folder", 1)
    with pytest.raises(DataError, match=r"cache.lock: cannot be written .*choose"):
        ShardCache(Path("/proc"), 1)  # refuses root too


def _fetch_on_a_small_disk(shards: ShardCache, url: str, record: ShardRecord, reports: object) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        shards.fetch(url, record)
    except DataError as error:
        reports.send(str(error))  # type: ignore[attr-defined]


def test_disk_that_refuses_a_file_of_this_size(storage: Storage, tmp_path: Path, fork: ForkContext) -> None:
    url, record = storage.shard()
    ours, theirs = fork.Pipe()
    process = fork.Process(target=_fetch_on_a_small_disk, args=(ShardCache(tmp_path, 400_000), url, record, theirs))
    process.start()
    joined(process)
    assert f"{url}: cannot be written to the cache {tmp_path} ([Errno 27] File too large), where it needs 300000" in (
        ours.recv()
    )
    assert names(tmp_path, ".partial") == set()


def test_full_disk(storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "_write_all", write)
    url, record = storage.shard()
    with pytest.raises(DataError, match=rf"{tmp_path} \(.*No space left.*\), where it needs 300000 bytes; free space"):
        ShardCache(tmp_path, 400_000).fetch(url, record)
    assert storage.gets[record.name] == 1
    assert names(tmp_path, ".partial") == set()


# --- room ---


def test_shard_larger_than_the_cache(storage: Storage, tmp_path: Path) -> None:
    url, record = storage.shard()
    shards = ShardCache(tmp_path, record.bytes - 1)
    with pytest.raises(DataError, match=f"{url}: has 300000 bytes.*holds 299999; raise data.cache_gb to 0.0003 "):
        shards.fetch(url, record)
    assert not storage.gets
    ShardCache(tmp_path, record.bytes).fetch(url, record)


def test_least_recently_used_goes_first_with_its_index(storage: Storage, tmp_path: Path) -> None:
    shards = ShardCache(tmp_path, 1_000_000)
    three = [storage.shard(number) for number in range(3)]
    for age, (url, record) in zip([200, 300, 100], three, strict=True):
        shards.fetch(url, record)
        os.utime(tmp_path / f"{record.sha256}.tar", (time.time() - age,) * 2)
    index_of_1 = tmp_path / f"{three[1][1].sha256}.01234567.index.npy"
    left_of_1 = tmp_path / f".{index_of_1.name}.host.1.partial"
    foreign = tmp_path / "notes.tar"
    for path in (index_of_1, left_of_1, foreign):
        path.write_bytes(b"?")
    shards.fetch(*storage.shard(3))
    assert [(tmp_path / f"{record.sha256}.tar").exists() for _, record in three] == [True, False, True]
    assert not index_of_1.exists()
    assert not left_of_1.exists()
    ShardCache(tmp_path, 1_000_000).fetch(*three[0])  # marks it as used
    shards.fetch(*storage.shard(4))
    assert [(tmp_path / f"{record.sha256}.tar").exists() for _, record in three] == [True, False, False]
    assert foreign.exists()


def test_use_is_marked_but_not_every_time(storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, record = storage.shard()
    ShardCache(tmp_path, 400_000).fetch(url, record)
    tar = tmp_path / f"{record.sha256}.tar"
    shards = ShardCache(tmp_path, 400_000)

    def marks() -> bool:
        os.utime(tar, (1, 1))
        os.close(shards.open(url, record))
        return tar.stat().st_mtime > 1

    assert marks()
    assert not marks()
    monkeypatch.setattr(cache, "_MARK_EVERY", 0.0)
    assert marks()


def _read_all(shards: ShardCache, wanted: list[tuple[str, ShardRecord]], seed: int) -> None:
    for position in np.random.default_rng(seed).permutation(len(wanted)):
        url, record = wanted[position]
        assert hashlib.sha256(content(shards, url, record)).hexdigest() == record.sha256


def test_capacity_is_never_exceeded(storage: Storage, tmp_path: Path, fork: ForkContext) -> None:
    capacity = 1_000_000
    shards = ShardCache(tmp_path, capacity)
    wanted = [storage.shard(number, 200_000 + 10_000 * number) for number in range(16)]
    processes = [fork.Process(target=_read_all, args=(shards, wanted, seed)) for seed in range(3)]
    for process in processes:
        process.start()
    largest = samples = 0
    while any(process.is_alive() for process in processes):
        sizes: dict[str, int] = {}
        for path in tmp_path.iterdir():  # a file may be met under both names while it is renamed
            if path.suffix in {".tar", ".partial"}:
                try:
                    sizes[path.stem] = path.stat().st_size
                except FileNotFoundError:
                    continue
        largest = max(largest, sum(sizes.values()))
        samples += 1
    joined(*processes)
    assert capacity // 2 < largest <= capacity
    assert samples > 20
    assert all(storage.gets[record.name] >= 1 for _, record in wanted)


def test_downloads_wait_for_room_that_others_have_reserved(storage: Storage, tmp_path: Path) -> None:
    one, other = storage.shard(1), storage.shard(2)
    storage.orders[one[1].name] = ["hold"]
    shards = ShardCache(tmp_path, 500_000)
    first = threading.Thread(target=shards.fetch, args=one)
    first.start()
    assert storage.held.acquire(timeout=PATIENCE)
    assert (tmp_path / f"{one[1].sha256}.partial").stat().st_size == one[1].bytes
    second = threading.Thread(target=shards.fetch, args=other)
    second.start()
    time.sleep(0.5)
    assert second.is_alive()
    assert storage.gets[other[1].name] == 0
    storage.release.set()
    first.join(PATIENCE)
    second.join(PATIENCE)
    assert names(tmp_path) == {f"{other[1].sha256}.tar"}


def test_what_killed_processes_left_is_removed_and_what_runs_is_not(storage: Storage, tmp_path: Path) -> None:
    running, new = storage.shard(1), storage.shard(2)
    storage.orders[running[1].name] = ["hold"]
    shards = ShardCache(tmp_path, 1_000_000)
    left = tmp_path / f"{'0' * 64}.partial"
    thread = threading.Thread(target=shards.fetch, args=running)
    thread.start()
    assert storage.held.acquire(timeout=PATIENCE)
    left.write_bytes(bytes(600_000))
    shards.fetch(*new)
    assert not left.exists()
    assert names(tmp_path, ".partial") == {f"{running[1].sha256}.partial"}
    storage.release.set()
    thread.join(PATIENCE)
    assert names(tmp_path) == {f"{record.sha256}.tar" for _, record in (running, new)}


def _hold_open(shards: ShardCache, url: str, record: ShardRecord, reports: object) -> None:
    descriptor = shards.open(url, record)
    reports.send("open")  # type: ignore[attr-defined]
    reports.recv()  # type: ignore[attr-defined]
    assert hashlib.sha256(os.pread(descriptor, record.bytes + 1, 0)).hexdigest() == record.sha256


def test_evicted_shard_can_be_read_by_who_has_it_open(storage: Storage, tmp_path: Path, context: Context) -> None:
    shards = ShardCache(tmp_path, 500_000)
    one, other = storage.shard(1), storage.shard(2)
    ours, theirs = context.Pipe()
    reader = context.Process(target=_hold_open, args=(shards, *one, theirs))
    reader.start()
    assert ours.recv() == "open"
    shards.fetch(*other)
    assert names(tmp_path) == {f"{other[1].sha256}.tar"}
    ours.send("read")
    joined(reader)


def test_eviction_between_fetch_and_open(storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, record = storage.shard()
    fetch, evictions = ShardCache.fetch, [f"{record.sha256}.tar"]

    def fetch_and_lose(self: ShardCache, url: str, record: ShardRecord) -> None:
        fetch(self, url, record)
        if evictions:
            (tmp_path / evictions.pop()).unlink()

    monkeypatch.setattr(ShardCache, "fetch", fetch_and_lose)
    assert content(ShardCache(tmp_path, 500_000), url, record) == storage.files[record.name]
    assert storage.gets[record.name] == 2


# --- the index ---


def labelled(storage: Storage, *labels: str, name: str = "labelled.tar") -> tuple[str, ShardRecord]:
    members = []
    for number, label in enumerate(labels):
        members += [(f"{number}.jpg", bytes(100 + number)), (f"{number}.cls", label.encode())]
    return storage.add(name, tar_bytes(*members))


def test_index_is_scanned_once(storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, record = labelled(storage, "2", "0", "1")
    shards = ShardCache(tmp_path / "cache", 1_000_000)
    index = shards.index(url, record, None)
    (tmp_path / "same.tar").write_bytes(storage.files[record.name])
    np.testing.assert_array_equal(index, index_tar(tmp_path / "same.tar"))
    scans: list[Path] = []
    monkeypatch.setattr(cache, "index_tar", lambda path, **_: scans.append(path))
    np.testing.assert_array_equal(ShardCache(tmp_path / "cache", 1_000_000).index(url, record, None), index)
    assert not scans
    assert storage.gets[record.name] == 1


def _index(shards: ShardCache, url: str, record: ShardRecord, barrier: object) -> None:
    scanned = index_tar

    def counted(path: Path, **options: object) -> object:
        with Path(f"{path}.scans").open("a") as file:
            file.write("x")
        time.sleep(0.2)
        return scanned(path, **options)  # type: ignore[arg-type]

    cache.index_tar = counted  # type: ignore[assignment]
    barrier.wait(PATIENCE)  # type: ignore[attr-defined]
    assert shards.index(url, record, None)["label"].tolist() == [2, 0, 1]


def test_index_is_scanned_by_one_process(storage: Storage, tmp_path: Path, fork: ForkContext) -> None:
    url, record = labelled(storage, "2", "0", "1")
    barrier = fork.Barrier(3)
    arguments = (ShardCache(tmp_path, 1_000_000), url, record, barrier)
    processes = [fork.Process(target=_index, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    joined(*processes)
    assert (tmp_path / f"{record.sha256}.tar.scans").read_text() == "x"
    assert storage.gets[record.name] == 1


def test_indexes_by_class_names_are_told_apart(storage: Storage, tmp_path: Path) -> None:
    url, record = labelled(storage, "cat", "dog", "cat")
    shards = ShardCache(tmp_path, 1_000_000)
    assert shards.index(url, record, ["cat", "dog"])["label"].tolist() == [0, 1, 0]
    assert shards.index(url, record, ["dog", "cat"])["label"].tolist() == [1, 0, 1]
    assert shards.index(url, record, ["cat", "dog"])["label"].tolist() == [0, 1, 0]
    assert shards.index(url, record, None, with_labels=False)["label"].tolist() == [-1, -1, -1]
    assert len(names(tmp_path, ".index.npy")) == 3
    with pytest.raises(DataError, match=f"{url}: cannot be indexed.*'cat'"):
        shards.index(url, record, None)


@pytest.mark.parametrize("damage", ["empty", "cut", "other", "text"])
def test_damaged_index_is_scanned_again(
    storage: Storage, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    url, record = labelled(storage, "2", "0", "1")
    shards = ShardCache(tmp_path, 1_000_000)
    index = shards.index(url, record, None)
    path = next(tmp_path.glob("*.index.npy"))
    whole = path.read_bytes()
    if damage == "other":
        np.save(path, index[:2])
    else:
        path.write_bytes({"empty": b"", "cut": whole[:-1], "text": b"PK\x03\x04 is no index"}[damage])
    np.testing.assert_array_equal(shards.index(url, record, None), index)
    assert path.read_bytes() == whole
    assert "again" in caplog.text


# --- ahead of need ---


def test_prefetcher_fetches_what_is_wanted_now_in_order_of_need() -> None:
    begun: list[int] = []
    gate = threading.Semaphore(0)

    def fetch(shard: int) -> None:
        begun.append(shard)
        assert gate.acquire(timeout=PATIENCE)

    prefetcher = Prefetcher(fetch, threads=1)
    prefetcher.want([5, 9, 9, 1])
    until(lambda: begun == [5])
    prefetcher.want([7, 5, 3, 7])  # 9 and 1 are no longer wanted; 5 is being fetched
    for _ in range(3):
        gate.release()
    until(lambda: begun == [5, 7, 3] and not prefetcher._running)
    prefetcher.want([5, 7, 3, 4])
    gate.release()
    until(lambda: begun == [5, 7, 3, 4])
    prefetcher.close()


def test_prefetcher_fetches_again_what_may_have_been_evicted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_REPEAT_AFTER", 0.05)
    begun: list[int] = []
    prefetcher = Prefetcher(begun.append, threads=1)
    prefetcher.want([1])
    until(lambda: begun == [1])
    time.sleep(0.1)
    prefetcher.want([1])
    until(lambda: begun == [1, 1])
    prefetcher.close()


def test_prefetcher_is_ahead_of_the_reader(storage: Storage, tmp_path: Path) -> None:
    wanted = [storage.shard(number) for number in range(6)]
    for _, record in wanted:
        storage.orders[record.name] = ["slow"]
    shards = ShardCache(tmp_path, 10_000_000)
    prefetcher = Prefetcher(lambda shard: shards.fetch(*wanted[shard]), threads=6)
    start = time.monotonic()
    prefetcher.want(range(6))
    assert all(content(shards, *shard) == storage.files[shard[1].name] for shard in wanted)
    assert time.monotonic() - start < 5 * 0.3  # they were downloaded side by side
    assert set(storage.gets.values()) == {1}
    prefetcher.close()


def test_error_in_prefetching_is_logged_and_stops_nothing(
    storage: Storage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = [storage.shard(number) for number in range(3)]
    del storage.files[wanted[0][1].name]
    shards = ShardCache(tmp_path, 10_000_000)
    prefetcher = Prefetcher(lambda shard: shards.fetch(*wanted[shard]), threads=1)
    with caplog.at_level(logging.WARNING):
        prefetcher.want([0, 1, 2])
        until(lambda: names(tmp_path) == {f"{record.sha256}.tar" for _, record in wanted[1:]})
    assert "shard 0: could not be fetched ahead of need: " in caplog.text
    with pytest.raises(DataError, match="there is no such file"):
        shards.open(*wanted[0])
    prefetcher.close()


def test_closed_prefetcher_starts_nothing_and_its_threads_end() -> None:
    begun: list[int] = []
    gate = threading.Event()

    def fetch(shard: int) -> None:
        begun.append(shard)
        gate.wait(PATIENCE)

    before = set(threading.enumerate())
    prefetcher = Prefetcher(fetch, threads=2)
    threads = set(threading.enumerate()) - before
    prefetcher.want([1, 2, 3])
    until(lambda: len(begun) == 2)
    start = time.monotonic()
    prefetcher.close()
    assert time.monotonic() - start < 1
    prefetcher.want([4])
    gate.set()
    until(lambda: not any(thread.is_alive() for thread in threads))
    assert sorted(begun) == [1, 2]


@pytest.mark.parametrize("close", [True, False])
def test_running_download_does_not_hold_up_the_end_of_the_process(
    storage: Storage, tmp_path: Path, close: bool
) -> None:
    url, record = storage.shard()
    storage.orders[record.name] = ["hold"]
    script = f"""
import sys
from pathlib import Path
from jitscale.data.cache import Prefetcher, ShardCache
from jitscale.data.manifest import ShardRecord
shards = ShardCache(Path({str(tmp_path)!r}), 400_000)
prefetcher = Prefetcher(lambda _: shards.fetch({url!r}, ShardRecord(**{json.dumps(record.__dict__)})))
prefetcher.want([0])
sys.stdin.read()
if {close}:
    prefetcher.close()
"""
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert storage.held.acquire(timeout=PATIENCE)
        start = time.monotonic()
        _, errors = process.communicate(timeout=PATIENCE)
        assert time.monotonic() - start < 5
    assert process.returncode == 0
    assert b"Traceback" not in errors
    ShardCache(tmp_path, 400_000).fetch(url, record)


# --- S3 ---


def test_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fork: ForkContext) -> None:
    boto3 = pytest.importorskip("boto3")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "no_proxy": host,
        }.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(remote, "_file_systems", {})
        monkeypatch.setattr(remote, "_BLOCK", 1 << 20)
        data = np.random.default_rng(0).bytes(3_500_000)
        client = boto3.client("s3")
        client.create_bucket(Bucket="shards")
        client.put_object(Bucket="shards", Key="set/shard 0.tar", Body=data)
        client.put_object(Bucket="shards", Key="set/manifest.json", Body=b"{}")
        url, record = "s3://shards/set/shard 0.tar", record_of("shard 0.tar", data)
        shards = ShardCache(tmp_path, 5_000_000)
        assert read_remote("s3://shards/set/manifest.json") == b"{}"
        child = fork.Process(
            target=_read_manifest_and_fetch, args=(shards, "s3://shards/set/manifest.json", url, record)
        )
        child.start()
        joined(child)
        client.delete_object(Bucket="shards", Key="set/shard 0.tar")
        assert content(shards, url, record) == data
        with pytest.raises(DataError, match=r"s3://shards/set/none.tar: there is no such file"):
            shards.fetch("s3://shards/set/none.tar", record_of("none.tar", b"none"))
        with pytest.raises(DataError, match="s3://elsewhere/none: there is no such file"):
            read_remote("s3://elsewhere/none")
    finally:
        server.stop()
