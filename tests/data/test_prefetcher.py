"""Shards are fetched ahead of need and in order of need. Fetching does not delay the end of a process."""

import json
import logging
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jitscale.data import prefetcher as prefetching
from jitscale.data.cache import ShardCache
from jitscale.data.prefetcher import Prefetcher
from jitscale.errors import DataError
from tests.data.caching import content, names, until
from tests.support.servers import PATIENCE, Storage


def test_prefetcher_fetches_the_wanted_shards_in_order_of_need() -> None:
    begun: list[int] = []
    gate = threading.Semaphore(0)

    def fetch(shard: int) -> None:
        begun.append(shard)
        assert gate.acquire(timeout=PATIENCE)

    prefetcher = Prefetcher(fetch, threads=1)
    prefetcher.want([5, 9, 9, 1])
    until(lambda: begun == [5])
    prefetcher.want([7, 5, 3, 7])  # 9 and 1 are no longer wanted; 5 is still being fetched.
    for _ in range(3):
        gate.release()
    until(lambda: begun == [5, 7, 3] and not prefetcher._running)
    prefetcher.want([5, 7, 3, 4])
    gate.release()
    until(lambda: begun == [5, 7, 3, 4])
    prefetcher.close()


def test_prefetcher_fetches_shards_again_that_may_have_been_evicted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetching, "_REPEAT_AFTER", 0.05)
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
    assert time.monotonic() - start < 5 * 0.3  # The downloads ran at the same time.
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
    assert "shard 0: could not be fetched in advance: " in caplog.text
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
def test_running_download_does_not_delay_the_end_of_the_process(storage: Storage, tmp_path: Path, close: bool) -> None:
    url, record = storage.shard()
    storage.orders[record.name] = ["hold"]
    script = f"""
import sys
from pathlib import Path
from jitscale.data.cache import ShardCache
from jitscale.data.prefetcher import Prefetcher
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
