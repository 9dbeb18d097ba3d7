"""The order of samples: each sample appears once an epoch, for any number of readers, and the order never changes."""

import itertools
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jitscale.data.images import encode
from jitscale.data.loader import ShardLoader
from jitscale.data.manifest import MANIFEST, Manifest
from jitscale.data.order import EpochOrder
from jitscale.data.shards import ShardSet
from jitscale.errors import DataError
from jitscale.preparation.packing import shard_name, write_shard

UNEVEN = [3, 50, 17, 1, 29, 64, 8, 40, 5, 31]  # 248 samples


def epoch_of(order: EpochOrder, epoch: int) -> list[tuple[int, int]]:
    positions = np.arange(epoch * order.num_samples, (epoch + 1) * order.num_samples)
    shards, indices = order.locate(positions)
    return list(zip(shards.tolist(), indices.tolist(), strict=True))


@pytest.mark.parametrize(("streams", "window"), [(1, 1), (1, 512), (4, 16), (7, 10), (8, 30), (512, 512)])
def test_every_epoch_is_a_permutation(streams: int, window: int) -> None:
    order = EpochOrder(UNEVEN, seed=3, streams=streams, window=window)
    everything = [(shard, index) for shard, count in enumerate(UNEVEN) for index in range(count)]
    epochs = [epoch_of(order, epoch) for epoch in (0, 1, 2, 1000)]
    assert all(sorted(epoch) == everything for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    assert epoch_of(EpochOrder(UNEVEN, 4, streams, window), 0) != epochs[0]


def test_positions_may_be_requested_in_any_grouping() -> None:
    """Positions may span windows and epochs. They may be requested singly, backwards or in one piece."""
    order = EpochOrder(UNEVEN, seed=3, streams=4, window=16)
    positions = np.arange(3 * order.num_samples)
    whole = np.stack(order.locate(positions))
    fresh = EpochOrder(UNEVEN, seed=3, streams=4, window=16)
    for position in positions[::-7]:
        np.testing.assert_array_equal(
            np.stack(fresh.locate(positions[position : position + 1]))[:, 0], whole[:, position]
        )


@pytest.mark.parametrize("epoch", [0, 5])
def test_streams_are_contiguous_and_shuffled_inside_windows(epoch: int) -> None:
    """248 samples make 7 streams of 36 or 35 samples. One stream with windows of one sample is the unshuffled order."""
    line = epoch_of(EpochOrder(UNEVEN, seed=0, streams=1, window=1), epoch)
    shard_order = list(dict.fromkeys(shard for shard, _ in line))
    assert line == [(shard, index) for shard in shard_order for index in range(UNEVEN[shard])]
    assert shard_order != sorted(shard_order)

    samples = epoch_of(EpochOrder(UNEVEN, seed=0, streams=7, window=10), epoch)
    start, moved = 0, 0
    for stream in range(7):
        column = samples[stream::7]
        assert len(column) == (36 if stream < 248 % 7 else 35)
        for first in range(0, len(column), 10):
            window = column[first : first + 10]
            expected = line[start + first : start + min(first + 10, len(column))]
            assert sorted(window) == sorted(expected)
            moved += window != expected
        start += len(column)
    assert moved > 20  # There are 28 windows.


def test_the_number_of_streams_depends_on_the_data_alone() -> None:
    assert EpochOrder([1000] * 1281, 0).streams == 512
    assert EpochOrder([10_000] * 128, 0).streams == 128  # There are as many streams as shards.
    # A stream has 781 samples; with 256 streams it would have less than a window.
    assert EpochOrder([100] * 1000, 0).streams == 128
    assert EpochOrder([256] * 7 + [5], 0).streams == 2
    assert EpochOrder([3], 0).streams == 1


def test_the_order_never_changes() -> None:
    """Every checkpoint depends on these numbers."""
    order = EpochOrder(UNEVEN, seed=7, streams=4, window=16)
    shards, indices = order.locate(np.array([0, 1, 2, 3, 4, 247, 248, 10_000]))
    assert shards.tolist() == [5, 9, 4, 6, 5, 1, 1, 2]
    assert indices.tolist() == [3, 4, 8, 6, 12, 45, 1, 16]


@pytest.mark.timeout(30)
def test_a_far_position_is_found_without_iterating_to_it() -> None:
    order = EpochOrder(np.full(100_000, 1000), seed=0)
    shards, indices = order.locate(np.array([12_345_678_901]))
    assert (0 <= shards[0] < 100_000, 0 <= indices[0] < 1000) == (True, True)


def test_an_order_without_samples_is_refused() -> None:
    with pytest.raises(DataError, match="0 samples"):
        EpochOrder([], seed=0)


# The property "each sample exactly once", for real shards read by the real loader

Leg = tuple[int, int, int, int]  # ranks, micro-batch, micro-batches a step, steps


def write_numbered(folder: Path, sizes: list[int]) -> ShardSet:
    """Write shards of `sizes`, some of them empty. The pixel and the label of each sample state its number."""
    numbers = itertools.count()
    records = []
    for shard, size in enumerate(sizes):
        samples = []
        for number in itertools.islice(numbers, size):
            pixel = np.full((1, 1, 3), number % 251, np.uint8)
            extension, data = encode(pixel, "raw")
            samples.append({"__key__": f"{number:09d}", extension: data, "cls": str(number).encode()})
        records.append(write_shard(folder / shard_name(shard), samples))
    total = sum(sizes)
    Manifest("raw", 1, total, None, total, records).write(folder / MANIFEST)
    return ShardSet.open(folder, total, 1)


def read_legs(shards: ShardSet, order: EpochOrder, legs: list[Leg], workers: int) -> list[int]:
    """The samples at positions 0, 1, 2, ... of a run that resumes with other ranks after each leg."""
    at: dict[int, int] = {}
    start = 0
    for world, micro, accumulated, steps in legs:
        size = world * micro * accumulated
        for rank in range(world):
            loader = ShardLoader(shards, order, size, micro, rank, world, start, workers, pin_memory=False)
            for batch in itertools.islice(loader, steps * accumulated):
                assert len(batch.labels) == micro
                assert batch.images[:, 0, 0, 0].tolist() == [label % 251 for label in batch.labels.tolist()]
                for position, label in zip(batch.positions.tolist(), batch.labels.tolist(), strict=True):
                    assert position not in at
                    at[position] = label
        start += steps * size
    assert sorted(at) == list(range(start)), "no position is left out"
    return [at[position] for position in range(start)]


def check_exactly_once(sizes: list[int], seed: int, streams: int, window: int, legs: list[Leg], workers: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        shards = write_numbered(Path(folder), sizes)
        order = EpochOrder(shards.samples_per_shard, seed, streams, window)
        sequence = read_legs(shards, order, legs, workers)
    total = sum(sizes)
    starts = np.cumsum(sizes) - np.array(sizes)
    for epoch in range(0, len(sequence), total):
        counted = Counter(sequence[epoch : epoch + total])
        assert set(counted.values()) == {1}
        assert len(counted) == min(total, len(sequence) - epoch)
    fresh = EpochOrder(sizes, seed, streams, window)
    where, index = fresh.locate(np.arange(len(sequence)))
    assert sequence == (starts[where] + index).tolist(), "the order depends only on data, seed, streams and window"


shard_sizes = st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any)
few_ranks = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
many_ranks = st.tuples(st.integers(1, 16), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
orders = {"seed": st.integers(0, 2**63), "streams": st.integers(1, 9), "window": st.integers(1, 50)}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(sizes=shard_sizes, legs=st.lists(many_ranks, min_size=1, max_size=3), **orders)
def test_exactly_once_in_any_world_size(
    sizes: list[int], seed: int, streams: int, window: int, legs: list[Leg]
) -> None:
    """The shards are uneven and some are empty.

    There are 1 to 16 ranks and several epochs; world size and batch change on the way.
    """
    check_exactly_once(sizes, seed, streams, window, legs, workers=0)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(sizes=shard_sizes, legs=st.lists(few_ranks, min_size=1, max_size=2), workers=st.integers(1, 3), **orders)
def test_exactly_once_with_workers(
    sizes: list[int], seed: int, streams: int, window: int, legs: list[Leg], workers: int
) -> None:
    """The same holds with worker processes."""
    check_exactly_once(sizes, seed, streams, window, legs, workers)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(sizes=shard_sizes, legs=st.lists(many_ranks, min_size=1, max_size=4), **orders)
def test_exactly_once_campaign(sizes: list[int], seed: int, streams: int, window: int, legs: list[Leg]) -> None:
    check_exactly_once(sizes, seed, streams, window, legs, workers=0)


def test_an_origin_moves_the_start_of_the_first_epoch() -> None:
    at_zero, moved = EpochOrder(UNEVEN, seed=3), EpochOrder(UNEVEN, seed=3, origin=1000)
    positions = np.arange(600)
    np.testing.assert_array_equal(at_zero.locate(positions), moved.locate(positions + 1000))
