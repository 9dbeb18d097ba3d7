"""The cache of remote shards, tested with real processes, a real HTTP server and a real S3 server."""

import fcntl
import hashlib
import os
import pickle
import resource
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.context import ForkContext
from pathlib import Path

import numpy as np
import pytest

from jitscale.data import cache, remote
from jitscale.data.cache import ShardCache
from jitscale.data.manifest import ShardRecord
from jitscale.data.remote import is_remote, read_remote
from jitscale.errors import DataError
from tests.data.caching import Context, content, joined, names, until, waits_for_lock
from tests.support.servers import PATIENCE, Storage, record_of

# --- fetching ---


@pytest.mark.parametrize("pattern", ["s3://bucket/a", "gs://bucket/a", "https://host/a", "http://host/a-{0..3}.tar"])
def test_remote_addresses(pattern: str) -> None:
    assert is_remote(pattern)


@pytest.mark.parametrize("pattern", ["/data/shards", "shards", "s3/shards", "ftp://host/a", "file:///a", ""])
def test_addresses_that_are_not_remote(pattern: str) -> None:
    assert not is_remote(pattern)


def test_content_equals_the_servers_and_is_fetched_once(storage: Storage, tmp_path: Path) -> None:
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


def test_truncated_file_is_fetched_again(storage: Storage, tmp_path: Path) -> None:
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


def test_killed_download_is_never_read_and_a_waiting_process_takes_over(
    storage: Storage, tmp_path: Path, context: Context
) -> None:
    url, record = storage.shard(size=2_000_000)
    storage.orders[record.name] = ["hold"]
    shards = ShardCache(tmp_path, 3_000_000)  # There is no room for the leftover file and for another one.
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
        until(lambda: not killed.is_alive())  # `join` would also wait for the child, which holds the pipe.
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


def test_forks_of_a_reading_process_can_read_and_do_not_disturb_it(
    storage: Storage, tmp_path: Path, fork: ForkContext
) -> None:
    address, _ = storage.add("manifest.json", b"{}")
    shards = ShardCache(tmp_path, 10_000_000)
    assert read_remote(address) == b"{}"  # The event loop runs and keeps a connection.
    held, other = storage.shard(1), storage.shard(2)
    storage.orders[held[1].name] = ["hold"]
    thread = threading.Thread(target=shards.fetch, args=held)
    thread.start()
    assert storage.held.acquire(timeout=PATIENCE)  # A download is running too.
    children = [fork.Process(target=_read_manifest_and_fetch, args=(shards, address, *other)) for _ in range(2)]
    for child in children:
        child.start()
    joined(*children)
    storage.release.set()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert read_remote(address) == b"{}"
    assert content(shards, *held) == storage.files[held[1].name]
    assert storage.gets == {"manifest.json": 4, held[1].name: 1, other[1].name: 1}


# --- failures ---


@pytest.mark.parametrize("order", ["503", "429", "cut", "wrong", "short", "long"])
def test_temporary_errors_are_retried_and_logged(
    storage: Storage, tmp_path: Path, impatient: None, caplog: pytest.LogCaptureFixture, order: str
) -> None:
    url, record = storage.shard()
    storage.orders[record.name] = [order, order]
    assert content(ShardCache(tmp_path, 400_000), url, record) == storage.files[record.name]
    assert storage.gets[record.name] == 3
    warnings = [message for message in caplog.messages if url in message and "of 5 failed" in message]
    assert len(warnings) == 2


def test_pauses_between_attempts_grow(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", waits.append)
    storage.orders["a"] = ["503"] * 4
    assert read_remote(storage.add("a", b"a")[0]) == b"a"
    assert waits == [0.25, 1, 4, 16]


def test_silent_server_is_abandoned_after_a_timeout(
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
def test_persistent_failure_is_an_error_and_leaves_nothing(
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
def test_permanent_errors_are_not_retried(storage: Storage, tmp_path: Path, order: str, message: str) -> None:
    url, record = storage.shard()
    storage.orders[record.name] = [order] * 2
    with pytest.raises(DataError, match=f"{url}: .*{message}"):
        ShardCache(tmp_path, 400_000).fetch(url, record)
    with pytest.raises(DataError, match=f"{url}: .*{message}"):
        read_remote(url)
    assert storage.gets[record.name] == 2


def test_unreachable_host_is_an_error(impatient: None) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/manifest.json"
        with pytest.raises(DataError, match=f"{url}: cannot be read in 5 attempts .*Connect"):
            read_remote(url)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(DataError, match=r"gs://bucket/a: .* not installed .* pip install 'jitscale\[gcs\]'"):
        read_remote("gs://bucket/a")


def test_manifest_cannot_choose_file_names_in_the_cache(storage: Storage, tmp_path: Path) -> None:
    url, _ = storage.shard()
    for sha256 in ("../../somewhere", "A" * 64, None):
        with pytest.raises(DataError, match="as its sha256"):
            ShardCache(tmp_path, 400_000).fetch(url, ShardRecord("a.tar", 1, 1, sha256))  # type: ignore[arg-type]


def test_folder_that_cannot_be_made_or_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/folder: cannot be created .*choose another"):
        ShardCache(tmp_path / "file" / "folder", 1)
    with pytest.raises(DataError, match=r"cache.lock: cannot be written .*choose"):
        ShardCache(Path("/proc"), 1)  # /proc refuses new folders, even for root.


def _fetch_on_a_small_disk(shards: ShardCache, url: str, record: ShardRecord, reports: object) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        shards.fetch(url, record)
    except DataError as error:
        reports.send(str(error))  # type: ignore[attr-defined]


def test_file_above_the_size_limit_of_the_disk_is_an_error(storage: Storage, tmp_path: Path, fork: ForkContext) -> None:
    url, record = storage.shard()
    ours, theirs = fork.Pipe()
    process = fork.Process(target=_fetch_on_a_small_disk, args=(ShardCache(tmp_path, 400_000), url, record, theirs))
    process.start()
    joined(process)
    needs = f"{url}: cannot be written to the cache {tmp_path} (it needs 300000 bytes) (File too large)"
    assert needs in ours.recv()
    assert names(tmp_path, ".partial") == set()


def test_full_disk_is_an_error(storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "_write_all", write)
    url, record = storage.shard()
    with pytest.raises(DataError, match=rf"{tmp_path} \(it needs 300000 bytes\) \(.*No space left.*\); free space"):
        ShardCache(tmp_path, 400_000).fetch(url, record)
    assert storage.gets[record.name] == 1
    assert names(tmp_path, ".partial") == set()


# --- S3 ---


def test_shards_are_fetched_from_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fork: ForkContext) -> None:
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
