"""The cache of remote shards: which copies it trusts, and who may own its folder."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from jitscale.data import cache, cache_folder
from jitscale.data.cache import ShardCache
from jitscale.data.images import ImageError
from jitscale.data.shards import ShardSet
from jitscale.errors import DataError
from jitscale.preparation.array_shards import write_shards
from tests.data.caching import content
from tests.support.pictures import numbered, samples_of
from tests.support.servers import Storage


def spoil(copy: Path) -> None:
    """Write other pixels with the same number of bytes and the same time stamp."""
    status = copy.stat()
    copy.write_bytes(bytes(status.st_size))
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_copy_with_different_content_is_never_read(
    storage: Storage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url, record = storage.shard()
    copy = tmp_path / f"{record.sha256}.tar"
    copy.write_bytes(bytes(record.bytes))  # Another user put the file there.
    shards = ShardCache(tmp_path, 400_000)
    assert content(shards, url, record) == storage.files[record.name]
    # The copy changes while a process uses it.
    spoil(copy)
    assert content(shards, url, record) == storage.files[record.name]
    # The copy changes between two processes.
    spoil(copy)
    assert content(ShardCache(tmp_path, 400_000), url, record) == storage.files[record.name]
    assert storage.gets[record.name] == 3
    assert [f"{url}: its copy {copy} differs from the manifest" in line for line in caplog.messages] == [True] * 3


def test_sound_copy_is_hashed_once_a_node_and_day(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, record = storage.shard()
    hashed: list[Path] = []
    monkeypatch.setattr(cache, "sha256_of", lambda path: hashed.append(path) or record.sha256)  # type: ignore[func-returns-value]
    (tmp_path / f"{record.sha256}.tar").write_bytes(storage.files[record.name])
    for _ in range(3):
        ShardCache(tmp_path, 400_000).fetch(url, record)
    assert (len(hashed), storage.gets[record.name]) == (1, 0)
    monkeypatch.setattr(cache.time, "time", lambda: 1e12)
    ShardCache(tmp_path, 400_000).fetch(url, record)
    assert len(hashed) == 2


def test_copy_with_a_bad_sample_is_hashed_once_a_node_and_hour(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, record = storage.shard()
    ShardCache(tmp_path, 400_000).fetch(url, record)
    hashed: list[Path] = []
    monkeypatch.setattr(cache, "sha256_of", lambda path: hashed.append(path) or record.sha256)  # type: ignore[func-returns-value]
    processes = [ShardCache(tmp_path, 400_000) for _ in range(4)]
    assert [one.evict_if_damaged(url, record) for one in processes[:3]] == [False] * 3
    assert len(hashed) == 1
    monkeypatch.setattr(cache.time, "time", lambda: os.stat(tmp_path).st_mtime + 4000)
    assert not processes[3].evict_if_damaged(url, record)
    assert len(hashed) == 2


@pytest.mark.parametrize("damage", ["[" * 200_000, '{"x": 1' + "0" * 5000 + "}", "5", '{"x": [[], 1e999]}', "\udcff"])
def test_a_lost_or_unreadable_note_costs_one_hash_only(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """The cache hashes the copy again. It does not download again, and it never loses a sound copy."""
    url, record = storage.shard()
    ShardCache(tmp_path, 400_000).fetch(url, record)
    (tmp_path / f"{record.sha256}.lock").write_text(damage, errors="surrogateescape")
    monkeypatch.setattr(ShardCache, "_vouch", full_disk)
    shards = ShardCache(tmp_path, 400_000)
    assert content(shards, url, record) == storage.files[record.name]
    assert not shards.evict_if_damaged(url, record)
    assert storage.gets[record.name] == 1


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_bad_sample_names_the_copy_and_a_damaged_copy_is_fetched_again(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "shards"
    write_shards(numbered(2), np.arange(2), folder, codec="png", samples_per_shard=2)
    for path in folder.iterdir():
        storage.add(path.name, path.read_bytes())

    def seen(path: Path) -> list[int] | None:
        return [0, path.stat().st_size, 0, 0] if path.exists() else None

    monkeypatch.setattr(cache, "_identity", seen)
    shards = ShardSet.open(storage.url, 2, cache_dir=tmp_path / "cache")
    (copy,) = (tmp_path / "cache").glob("*.tar")
    spoil(copy)  # The disk damages the copy; the cache sees no change.
    expected = samples_of(ShardSet.open(folder, 2))
    assert samples_of(shards) == expected
    assert storage.gets["shard-000000.tar"] == 2
    spoil(copy)
    with pytest.raises(ImageError, match=rf"{storage.url}/shard-000000.tar \(copied to {copy}\): byte \d+: sample 0"):
        shards.read(0, 0)  # Each process checks once: if the new copy is bad too, the storage itself may be damaged.


def test_default_folder_belongs_to_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_folder.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = cache_folder.usual_cache_folder()
    assert (folder.parent, folder.stat().st_mode & 0o777) == (tmp_path, 0o700)
    assert cache_folder.usual_cache_folder() == folder
    folder.chmod(0o777)
    with pytest.raises(DataError, match=rf"can be written by others \(mode 0777\); remove it, or chmod 700 {folder}"):
        cache_folder.usual_cache_folder()
    folder.chmod(0o700)
    monkeypatch.setattr(cache_folder.os, "getuid", lambda: 12345)
    folder.rename(foreign := tmp_path / "jitscale-shards-12345")
    with pytest.raises(DataError, match=r"belongs to the user \d+, so .*; set data.cache_dir"):
        cache_folder.usual_cache_folder()
    foreign.rename(tmp_path / "real")
    foreign.symlink_to(tmp_path / "real")
    with pytest.raises(DataError, match="is a link"):
        cache_folder.usual_cache_folder()
