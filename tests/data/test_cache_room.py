"""Room in the cache of remote shards: eviction, downloads that wait for room, and the indexes next to the shards."""

import hashlib
import os
import threading
import time
from multiprocessing.context import ForkContext
from pathlib import Path

import numpy as np
import pytest

from jitscale.data import cache
from jitscale.data.cache import ShardCache
from jitscale.data.find import find_tars
from jitscale.data.manifest import ShardRecord
from jitscale.data.shards import ShardSet
from jitscale.data.tar_index import index_tar
from jitscale.data.tar_labels import NOWHERE, LabelKey
from jitscale.errors import DataError
from jitscale.preparation.survey import survey
from tests.data.caching import Context, content, joined, names
from tests.support.pictures import numbered_png, samples_of, tar_bytes, write_tar
from tests.support.servers import PATIENCE, Storage


def test_shard_larger_than_the_cache_is_refused(storage: Storage, tmp_path: Path) -> None:
    url, record = storage.shard()
    shards = ShardCache(tmp_path, record.bytes - 1)
    with pytest.raises(DataError, match=f"{url}: has 300000 bytes.*room for 299999; raise data.cache_gb to 0.0003 "):
        shards.fetch(url, record)
    assert not storage.gets
    ShardCache(tmp_path, record.bytes).fetch(url, record)


def test_least_recently_used_goes_first_with_its_index(storage: Storage, tmp_path: Path) -> None:
    shards = ShardCache(tmp_path, 1_000_000)
    three = [storage.shard(number) for number in range(3)]
    for age, (url, record) in zip([200, 300, 100], three, strict=True):
        shards.fetch(url, record)
        os.utime(tmp_path / f"{record.sha256}.lock", (time.time() - age,) * 2)
    index_of_1 = tmp_path / f"{three[1][1].sha256}.01234567.index.npy"
    left_of_1 = tmp_path / f".{index_of_1.name}.host.1.partial"
    foreign = tmp_path / "notes.tar"
    for path in (index_of_1, left_of_1, foreign):
        path.write_bytes(b"?")
    shards.fetch(*storage.shard(3))
    assert [(tmp_path / f"{record.sha256}.tar").exists() for _, record in three] == [True, False, True]
    assert not index_of_1.exists()
    assert not left_of_1.exists()
    ShardCache(tmp_path, 1_000_000).fetch(*three[0])  # A fetch marks the shard as used.
    shards.fetch(*storage.shard(4))
    assert [(tmp_path / f"{record.sha256}.tar").exists() for _, record in three] == [True, False, False]
    assert foreign.exists()


def test_use_is_marked_at_most_once_in_a_while(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, record = storage.shard()
    ShardCache(tmp_path, 400_000).fetch(url, record)
    lock = tmp_path / f"{record.sha256}.lock"
    shards = ShardCache(tmp_path, 400_000)

    def marks() -> bool:
        os.utime(lock, (1, 1))
        os.close(shards.open(url, record))
        return lock.stat().st_mtime > 1

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
        # During a rename, a file may be listed under both names.
        for path in tmp_path.iterdir():
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


def test_downloads_wait_while_others_have_reserved_the_room(storage: Storage, tmp_path: Path) -> None:
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


def test_leftovers_of_killed_processes_are_removed_and_running_downloads_are_kept(
    storage: Storage, tmp_path: Path
) -> None:
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


def test_evicted_shard_stays_readable_where_it_is_open(storage: Storage, tmp_path: Path, context: Context) -> None:
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


def test_shard_evicted_between_fetch_and_open_is_fetched_again(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, record = storage.shard()
    fetch, evictions = ShardCache.fetch, [f"{record.sha256}.tar"]

    def fetch_and_lose(self: ShardCache, url: str, record: ShardRecord) -> None:
        fetch(self, url, record)
        if evictions:
            (tmp_path / evictions.pop()).unlink()

    monkeypatch.setattr(ShardCache, "fetch", fetch_and_lose)
    assert content(ShardCache(tmp_path, 500_000), url, record) == storage.files[record.name]
    assert storage.gets[record.name] == 2


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

    def counted(path: Path, *options: object) -> object:
        with Path(f"{path}.scans").open("a") as file:
            file.write("x")
        time.sleep(0.2)
        return scanned(path, *options)  # type: ignore[arg-type]

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
    assert shards.index(url, record, None, NOWHERE)["label"].tolist() == [-1, -1, -1]
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


def test_labels_are_read_from_the_place_named_in_the_manifest(storage: Storage, tmp_path: Path) -> None:
    """This also holds for the local copy of a remote shard, which is scanned."""
    (tmp_path / "in").mkdir()
    one = ("0.png", numbered_png(8, 0)), ("0.json", b'{"label": "dog"}')
    write_tar(tmp_path / "in" / "0.tar", *one, ("1.png", numbered_png(8, 1)), ("1.json", b'{"label": "cat"}'))
    survey(find_tars(str(tmp_path / "in")), None, 1, key=LabelKey.parse("json:label")).write()
    for name in ("0.tar", "manifest.json"):
        storage.add(name, (tmp_path / "in" / name).read_bytes())
    assert samples_of(ShardSet.open(storage.url, 2, cache_dir=tmp_path / "cache")) == [(0, 1), (1, 0)]
