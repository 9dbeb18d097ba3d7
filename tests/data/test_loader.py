"""Micro-batches: the global sequence is the same for any number of ranks and workers, and from any position on."""

import gc
import multiprocessing
import os
import re
import shutil
import signal
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from jitscale.data.loader import Batch, ShardLoader
from jitscale.data.order import EpochOrder
from jitscale.data.shards import ShardSet
from jitscale.data.workers import naming_dead_workers
from jitscale.errors import DataError
from jitscale.preparation.array_shards import write_shards
from jitscale.training.noise import to_model_input
from tests.support.servers import serving

COUNT = 50
CLASSES = 10

Sequence = dict[int, tuple[int, int]]  # position -> (number of the image, label)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """50 images in uneven shards. The pixels of each image equal its number."""
    folder = tmp_path_factory.mktemp("shards")
    images = np.broadcast_to(np.arange(COUNT, dtype=np.uint8)[:, None, None, None], (COUNT, 8, 8, 3))
    write_shards(images, np.arange(COUNT) % CLASSES, folder, codec="raw", samples_per_shard=9)
    return ShardSet.open(folder, CLASSES, 8)


@pytest.fixture(params=["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def start_method(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each start method that some platform uses for workers by default."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(request.param, force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


def loader(
    shards: ShardSet, *, rank: int = 0, world: int = 1, start: int = 0, size: int = 12, micro: int = 2, workers: int = 0
) -> ShardLoader:
    order = EpochOrder(shards.samples_per_shard, seed=1, streams=4, window=8)
    return ShardLoader(shards, order, size, micro, rank, world, start, workers, pin_memory=False)


def sequence(batches: list[Batch]) -> Sequence:
    """The sample at each position. A position that appears twice is an error."""
    found: Sequence = {}
    for batch in batches:
        assert (batch.images.dtype, batch.labels.dtype, batch.positions.dtype) == (
            torch.uint8,
            torch.int64,
            torch.int64,
        )
        for image, label, position in zip(batch.images, batch.labels, batch.positions, strict=True):
            assert bool((image == image[0, 0, 0]).all())
            assert int(position) not in found
            found[int(position)] = int(image[0, 0, 0]), int(label)
    return found


def steps(shards: ShardSet, count: int, *, world: int, start: int, size: int, micro: int, workers: int = 0) -> Sequence:
    """`count` global batches, put together from all ranks."""
    batches: list[Batch] = []
    for rank in range(world):
        endless = loader(shards, rank=rank, world=world, start=start, size=size, micro=micro, workers=workers)
        batches += islice(endless, count * size // world // micro)
    return sequence(batches)


def test_positions_are_divided_among_ranks_as_documented(shards: ShardSet) -> None:
    batches = list(islice(loader(shards, rank=1, world=3, start=5), 4))
    assert [batch.positions.tolist() for batch in batches] == [[6, 9], [12, 15], [18, 21], [24, 27]]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_global_sequence_depends_neither_on_ranks_nor_on_workers(
    shards: ShardSet, world: int, workers: int
) -> None:
    """Ten global batches cover more than two epochs."""
    expected = steps(shards, 10, world=1, start=0, size=12, micro=12)
    assert list(expected) == list(range(120))
    assert steps(shards, 10, world=world, start=0, size=12, micro=2, workers=workers) == expected
    assert all(label == number % CLASSES for number, label in expected.values())
    for epoch in range(2):
        assert sorted(expected[epoch * COUNT + place][0] for place in range(COUNT)) == list(range(COUNT))


@pytest.mark.parametrize("start", [1, 12, 49, 50, 61])
def test_a_resume_continues_the_sequence(shards: ShardSet, start: int) -> None:
    expected = steps(shards, 10, world=1, start=0, size=12, micro=12)
    resumed = steps(shards, 3, world=2, start=start, size=12, micro=3)
    assert resumed == {position: expected[position] for position in range(start, start + 36)}


def test_a_change_of_the_global_batch_loses_and_repeats_nothing(shards: ShardSet) -> None:
    before = steps(shards, 2, world=2, start=0, size=12, micro=3)
    after = steps(shards, 4, world=3, start=24, size=24, micro=4)
    assert before.keys().isdisjoint(after.keys())
    assert before | after == steps(shards, 10, world=1, start=0, size=12, micro=12)


def test_batches_that_cannot_be_divided_are_refused(shards: ShardSet) -> None:
    with pytest.raises(DataError, match=r"batch_size=12: is not a multiple of 5 ranks x micro-batch 2 = 10"):
        loader(shards, world=5)
    with pytest.raises(DataError, match=r"batch_size=12: is not a multiple of 1 ranks x micro-batch 5 = 5"):
        loader(shards, micro=5)


def damage(folder: Path, samples: list[int]) -> None:
    """Overwrite images of the first shard with zeros, without changing the manifest."""
    index = np.load(folder / "shard-000000.index.npy")
    with (folder / "shard-000000.tar").open("r+b") as file:
        for sample in samples:
            file.seek(int(index[sample]["offset"]))
            file.write(bytes(int(index[sample]["size"])))


def test_damaged_images_get_the_same_replacement_on_any_rank(tmp_path: Path) -> None:
    """The replacement is the same for any number of ranks and workers.

    All other positions keep their sample, and each replacement is counted once.
    """
    images = np.broadcast_to(np.arange(COUNT, dtype=np.uint8)[:, None, None, None], (COUNT, 8, 8, 3))
    write_shards(images, np.arange(COUNT) % CLASSES, tmp_path, codec="png", samples_per_shard=25)
    sound = steps(ShardSet.open(tmp_path, CLASSES, 8), 5, world=1, start=0, size=12, micro=12)
    damage(tmp_path, [0, 3, 4])
    shards = ShardSet.open(tmp_path, CLASSES, 8)  # Sample 0 is damaged, but the set still opens.
    dirty = steps(shards, 5, world=1, start=0, size=12, micro=12)
    assert steps(shards, 5, world=2, start=0, size=12, micro=3) == dirty
    assert steps(shards, 5, world=1, start=0, size=12, micro=4, workers=2) == dirty
    replaced = [position for position in sound if dirty[position] != sound[position]]
    assert len({sound[position] for position in replaced}) == 3
    assert len({dirty[position] for position in replaced}) > 1
    assert all(label == number % CLASSES for number, label in dirty.values())
    reasons = [reason for batch in islice(loader(shards, workers=2), 25) for reason in batch.bad_samples]
    assert all(re.match(rf"{tmp_path}/shard-000000.tar: byte \d+: sample [034] cannot be decoded", r) for r in reasons)
    assert len(reasons) == 3  # One epoch has 25 batches of 2.


@pytest.mark.parametrize("workers", [0, 2])
def test_too_much_damage_is_a_one_line_error(tmp_path: Path, workers: int) -> None:
    write_shards(np.zeros((8, 8, 8, 3), np.uint8), [0] * 8, tmp_path, codec="png")
    shards = ShardSet.open(tmp_path, 1, 8)
    damage(tmp_path, list(range(8)))
    with pytest.raises(
        DataError, match=r"byte \d+: sample \d .*10 replacements could not be decoded.*--verify"
    ) as caught:
        list(islice(loader(shards, size=8, micro=8, workers=workers), 1))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_lost_shard_is_a_one_line_error(tmp_path: Path, workers: int) -> None:
    """No other samples replace those of a lost shard: failing storage is not a bad image."""
    write_shards(np.zeros((8, 8, 8, 3), np.uint8), [0] * 8, tmp_path, samples_per_shard=4)
    shards = ShardSet.open(tmp_path, 1, 8)
    (tmp_path / "shard-000001.tar").unlink()
    with pytest.raises(DataError, match=r"shard-000001.tar: can no longer be opened .*; restore it$"):
        list(islice(loader(shards, size=8, micro=8, workers=workers), 1))


@pytest.mark.timeout(60)
@pytest.mark.usefixtures("start_method")
def test_a_dead_worker_is_named(shards: ShardSet) -> None:
    batches = iter(loader(shards, workers=2))
    first = next(batches)
    assert sequence([first]) == sequence(list(islice(loader(shards), 1)))
    victim = multiprocessing.active_children()[0].pid
    assert victim is not None

    def die() -> None:
        with naming_dead_workers():
            os.kill(victim, signal.SIGKILL)
            for _ in range(1000):
                next(batches)

    with pytest.raises(DataError, match=rf"data.num_workers: DataLoader worker \(pid.* {victim}\).*start the same"):
        die()
    batches.close()


@pytest.mark.usefixtures("start_method")
def test_workers_leave_signals_to_the_trainer(shards: ShardSet) -> None:
    """Slurm signals every process of a step. The trainer saves its state after that, so batches must continue."""
    batches = iter(loader(shards, workers=2))
    found = list(islice(batches, 6))  # The start of both workers is complete.
    workers = multiprocessing.active_children()
    for worker in workers:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            assert worker.pid is not None
            os.kill(worker.pid, number)
    found += islice(batches, 30)
    assert sequence(found) == sequence(list(islice(loader(shards), 36)))
    assert all(worker.is_alive() for worker in workers)
    batches.close()
    assert not any(worker.is_alive() for worker in workers)


def test_workers_end_although_their_iterator_is_still_referenced(shards: ShardSet) -> None:
    """A traceback that is kept for a report holds the iterator."""
    batches = iter(loader(shards, workers=2))
    next(batches)
    workers = multiprocessing.active_children()
    held = [found for found in gc.get_objects() if type(found) is _MultiProcessingDataLoaderIter]
    assert held
    batches.close()
    assert not any(worker.is_alive() for worker in workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_remote_shards_give_the_same_sequence(shards: ShardSet, tmp_path: Path, workers: int) -> None:
    """Two ranks read through a cache that holds two of the six shards, so each shard is fetched in time or again."""
    folder = Path(shards._shards[0].location).parent
    with serving(folder) as address:
        size = max(path.stat().st_size for path in folder.glob("*.tar"))
        remote = ShardSet.open(address, CLASSES, 8, cache_dir=tmp_path, cache_bytes=2 * size)
        assert remote.manifest_hash == shards.manifest_hash
        expected = steps(shards, 10, world=2, start=0, size=12, micro=3)
        assert steps(remote, 10, world=2, start=0, size=12, micro=3, workers=workers) == expected
        assert sum(path.stat().st_size for path in tmp_path.glob("*.tar")) <= 2 * size
        some = ShardSet.open(f"{address}/shard-{{000001..000002}}.tar", CLASSES, 8, cache_dir=tmp_path)
        assert some.samples_per_shard.tolist() == [9, 9]
        with pytest.raises(DataError, match=r"shard-000009.tar: is not in the manifest"):
            ShardSet.open(f"{address}/shard-000009.tar", CLASSES, 8, cache_dir=tmp_path)
        with pytest.raises(DataError, match="names a shard twice"):
            ShardSet.open(f"{address}/shard-{{000001,000001}}.tar", CLASSES, 8, cache_dir=tmp_path)
        with pytest.raises(DataError, match=r"data.cache_gb=.*reads 6 shards at the same time.*raise it, or lower"):
            remote.check_cache(loader(remote).shards_side_by_side(1))


def test_too_little_shared_memory_is_reported_at_the_start(shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 8 * 2 * 3 * 4 * (8 * 8 * 3 + 16)  # ranks x workers x batches each x images x bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    loader(shards, micro=4, workers=2).check_shared_memory(8)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    loader(shards).check_shared_memory(8)
    with pytest.raises(DataError, match=r"/dev/shm: has 0 MiB free, 8 ranks x 2 workers need 1 MiB; enlarge"):
        loader(shards, micro=4, workers=2).check_shared_memory(8)


def test_loading_does_not_change_the_random_state_of_training(shards: ShardSet) -> None:
    before = torch.random.get_rng_state()
    list(islice(loader(shards), 3))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_pixels_are_flipped_and_scaled_for_the_model() -> None:
    pixels: npt.NDArray[np.uint8] = np.zeros((2, 1, 3, 3), np.uint8)
    pixels[:, 0, :, 0] = [0, 51, 255]
    x = to_model_input(torch.from_numpy(pixels), torch.tensor([False, True]))
    assert (x.shape, x.dtype, x.is_contiguous()) == ((2, 3, 1, 3), torch.float32, True)
    torch.testing.assert_close(x[:, 0, 0], torch.tensor([[-1.0, -0.6, 1.0], [1.0, -0.6, -1.0]]))
    assert bool((x[:, 1:] == -1).all())
