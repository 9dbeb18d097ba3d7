"""webdataset's reader gives each sample once, in tar order."""

import errno
import os
import shutil
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from jitscale.data import passes
from jitscale.data.passes import read_once
from jitscale.data.shards import ShardSet
from jitscale.errors import DataError, StorageError
from tests.data.test_shards import CLASSES, pack
from tests.support.pictures import number_of, numbered, numbered_png, samples_of, tar_bytes, write_tar
from tests.support.servers import serving


@pytest.fixture(autouse=True)
def workers_for_few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "FEWEST_FOR_WORKERS", 1)


def numbers(shards: ShardSet, samples: range, block: int = 3, workers: int = 0) -> list[list[int]]:
    return [[number_of(image) for image in images] for images in read_once(shards, samples, block, workers)]


@pytest.mark.parametrize("codec", ["raw", "png"])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_any_range_comes_in_order_for_any_number_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str, workers: int
) -> None:
    monkeypatch.setenv("WORKER", "1")
    monkeypatch.setenv("NUM_WORKERS", "2")
    pack(tmp_path, count=40, per_shard=7, codec=codec)
    shards = ShardSet.open(tmp_path, CLASSES)
    expected = [number for number, _ in samples_of(shards)]
    for samples in (range(40), range(5, 31), range(14, 15), range(6, 8)):
        found = numbers(shards, samples, 4, workers)
        assert list(chain(*found)) == expected[samples.start : samples.stop]
        assert [len(block) for block in found[:-1]] == [4] * ((len(samples) - 1) // 4)


def test_odd_names_and_other_members_are_read_as_in_training(tmp_path: Path) -> None:
    """webdataset itself skips `__meta__`, and it takes a hidden file for a sample named like its folder."""
    members = [
        ("x/._1.png", b"no image"),
        ("__meta__/1.cls", b"1"),
        ("__meta__/1.png", numbered_png(8, 1)),
        ("__meta__/1.b.png", b""),
    ]
    members += [("x/2.v1.png", b"no"), ("x/2.json", b"{}"), ("x/2.PNG", numbered_png(8, 2)), ("x/2.cls", b"2")]
    members += [("y/" + "3" * 200 + ".png", numbered_png(8, 3)), ("y/.png", b"no image"), ("4.png", numbered_png(8, 4))]
    write_tar(tmp_path / "a.tar", *members)
    shards = ShardSet.open(tmp_path / "a.tar", 0)
    assert [number for number, _ in samples_of(shards)] == [1, 2, 3, 4]
    for first in range(4):
        assert numbers(shards, range(first, 4), 2)[0][0] == first + 1
    assert numbers(shards, range(4), 4) == [[1, 2, 3, 4]]


def test_failing_storage_is_not_reported_as_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After such an error the job is started again."""
    pack(tmp_path, count=12, per_shard=12)
    shards = ShardSet.open(tmp_path, CLASSES)

    def fail(*_: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", fail)
    for read in (lambda: shards.read(0, 3), lambda: numbers(shards, range(12), 4, 0)):
        with pytest.raises(StorageError, match=r"cannot be read.*Input/output error") as met:
            read()
        assert not met.value.is_wrong


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_is_named(tmp_path: Path, workers: int) -> None:
    """This includes damage at which webdataset stops silently, and damage at which it raises."""
    pack(tmp_path / "shards", count=12, per_shard=12)
    whole = (tmp_path / "shards" / "shard-000000.tar").read_bytes()
    offsets = np.load(tmp_path / "shards" / "shard-000000.index.npy")["offset"]

    def said(name: str, content: bytes) -> str:
        folder = shutil.copytree(tmp_path / "shards", tmp_path / name)
        shards = ShardSet.open(folder, CLASSES)
        (folder / "shard-000000.tar").write_bytes(content)
        with pytest.raises(DataError) as caught:
            numbers(shards, range(12), 4, workers)
        assert "\n" not in str(caught.value)
        return str(caught.value).removeprefix(f"{folder}/shard-000000.tar: ")

    header = int(offsets[5]) - 512
    flipped = whole[:header] + bytes([whole[header] ^ 1]) + whole[header + 1 :]
    assert said("flipped", flipped).startswith(f"byte {offsets[5]}: sample 5 is not at its place in the index")
    cut = said("cut", whole[: int(offsets[9]) + 5])
    assert cut.startswith(f"byte {offsets[8]}: sample 8 or a later one cannot be read (ends after 0 of 512 bytes")
    broken = whole[: offsets[7]] + bytes(20) + whole[int(offsets[7]) + 20 :]
    assert said("image", broken).startswith(f"byte {offsets[7]}: sample 7 cannot be decoded as png")
    other = tar_bytes(*((f"{number}.png", bytes(10)) for number in range(12)))
    assert "sample 0 has 10 bytes, but" in said("other", other)


def test_remote_shards_are_fetched_as_they_are_read(tmp_path: Path) -> None:
    pack(tmp_path / "shards", count=20, per_shard=4)
    size = max(path.stat().st_size for path in (tmp_path / "shards").glob("*.tar"))
    with serving(tmp_path / "shards") as address:
        remote = ShardSet.open(address, CLASSES, cache_dir=tmp_path / "cache", cache_bytes=2 * size)
        found = list(chain(*numbers(remote, range(20), 3, 2)))
    assert found == [number for number, _ in samples_of(ShardSet.open(tmp_path / "shards", CLASSES))]
    assert sorted(found) == sorted(number_of(image) for image in numbered(20))
