"""Helpers of the tests of the cache of remote shards."""

import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.context import ForkContext, SpawnContext
from pathlib import Path

from jitscale.data.cache import ShardCache
from jitscale.data.manifest import ShardRecord
from tests.support.servers import PATIENCE

Context = ForkContext | SpawnContext


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
        assert time.monotonic() < end, "the condition did not become true in time"
        time.sleep(0.01)


def joined(*processes: multiprocessing.process.BaseProcess) -> None:
    for process in processes:
        process.join(PATIENCE)
        if process.is_alive():
            process.kill()
        assert process.exitcode == 0


def waits_for_lock(path: Path) -> bool:
    """Whether a process waits for the flock, as /proc/locks shows."""
    inode = f":{path.stat().st_ino} "
    return any("->" in line and inode in line for line in Path("/proc/locks").read_text().splitlines())
