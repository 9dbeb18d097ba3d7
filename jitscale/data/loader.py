"""Micro-batches of one rank, from any position of the global sequence.

Shapes: B images of a micro-batch, H rows, W columns, A channels. G is the global batch, R the number of ranks.
"""

import shutil
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from jitscale.data.images import ImageError, UInt8Array
from jitscale.data.order import EpochOrder
from jitscale.data.prefetcher import Prefetcher
from jitscale.data.shards import ShardSet
from jitscale.data.workers import BATCHES_AHEAD, start_workers
from jitscale.errors import DataError
from jitscale.files import check_socket_folder
from jitscale.keyed_random import Int64Array, Purpose, hash64

SHARED_MEMORY = Path("/dev/shm")  # worker processes pass batches through it

_MOST_REPLACEMENTS = 10  # limit for one position; if all replacements fail, the shards are damaged as a whole


class Batch(NamedTuple):
    """The input of one forward pass, in its stored form: pixels have 8 bits, and the device converts them."""

    images: torch.Tensor  # uint8 (B, H, W, A)
    labels: torch.Tensor  # int64 (B,)
    positions: torch.Tensor  # int64 (B,), in the global sequence
    bad_samples: list[str]  # the error of each sample that was replaced


@dataclass(frozen=True)
class ShardLoader:
    """An endless iterable of one rank's micro-batches.

    A global batch is the next G positions. Rank r takes offsets r, r + R, r + 2 R, ... of it, and its micro-batches are
    consecutive slices of that list, so any R and any micro-batch size read the same global batches. The loader has no
    state to save: the trainer computes the position from its steps.

    An image that cannot be decoded is replaced by another sample, chosen by a hash of its position. Raises a DataError
    if G is not a multiple of R times B; while iterating, if a shard cannot be read, or if a worker has died.
    """

    shard_set: ShardSet
    order: EpochOrder
    global_batch_size: int  # G
    micro_batch_size: int  # B
    rank: int  # r
    world_size: int  # R
    start_position: int  # position of the first global batch
    num_workers: int  # processes that read ahead; 0: this process reads
    pin_memory: bool  # copy batches into page-locked memory

    def __post_init__(self) -> None:
        together = self.world_size * self.micro_batch_size
        if self.global_batch_size % together != 0:
            product = f"{self.world_size} ranks x micro-batch {self.micro_batch_size} = {together}"
            size = self.global_batch_size
            raise DataError(f"data.batch_size={size}: is not a multiple of {product}; change one of them")

    def __iter__(self) -> Generator[Batch, None, None]:
        dataset, order = _MicroBatches(self.shard_set, self.order), self.order
        # One endless epoch, so that the workers live as long as the iterator.
        batches = start_workers(dataset, self.num_workers, sampler=self._positions(), pin_memory=self.pin_memory)
        # Started after the workers, which must not inherit a lock that a thread of the prefetcher holds.
        prefetcher = Prefetcher(self.shard_set.fetch) if self.shard_set.is_remote else None
        reach, next_look = max(order.streams * order.window, 4 * self.global_batch_size), self.start_position
        try:
            for start in count(self.start_position, self.global_batch_size):
                if prefetcher is not None and start >= next_look:
                    ahead = np.arange(start + self.rank, start + reach, self.world_size)
                    prefetcher.want(order.locate(ahead)[0].tolist())
                    next_look = start + reach // 4
                yield from islice(batches, self.global_batch_size // (self.world_size * self.micro_batch_size))
        finally:
            batches.close()
            if prefetcher is not None:
                prefetcher.close()

    def _positions(self) -> Iterator[Int64Array]:
        """The positions (B,) of each micro-batch in turn."""
        for start in count(self.start_position, self.global_batch_size):
            mine = np.arange(start + self.rank, start + self.global_batch_size, self.world_size)
            yield from mine.reshape(-1, self.micro_batch_size)

    def shards_side_by_side(self, local_ranks: int) -> int:
        """About how many shards `local_ranks` ranks of a node read at the same time: two for each stream."""
        streams = self.order.streams
        if streams % self.world_size == 0:
            streams = streams // self.world_size * local_ranks
        return 2 * streams

    def check_shared_memory(self, local_ranks: int) -> None:
        """Raise a DataError if the batches of `local_ranks` ranks would fill the node's shared memory (a SIGBUS).

        Also raises what `check_socket_folder` raises: here all ranks can raise it together.
        """
        if self.num_workers:
            check_socket_folder()
        batch = self.micro_batch_size * (self.shard_set.image_size**2 * self.shard_set.channels + 16)
        needed = local_ranks * self.num_workers * (BATCHES_AHEAD + 1) * batch
        free = shutil.disk_usage(SHARED_MEMORY).free if needed and SHARED_MEMORY.exists() else needed
        if needed > free:
            readers = f"{local_ranks} ranks x {self.num_workers} workers need {-(-needed >> 20)} MiB"
            remedy = "enlarge it (containers: --shm-size) or lower data.num_workers"
            raise DataError(f"{SHARED_MEMORY}: has {free >> 20} MiB free, {readers}; {remedy}")


@dataclass(frozen=True)
class _MicroBatches(Dataset["Batch | DataError"]):
    """Batches by their positions, read in the worker."""

    shards: ShardSet
    order: EpochOrder

    def __getitem__(self, positions: Int64Array) -> Batch | DataError:
        size = self.shards.image_size
        images = np.empty((len(positions), size, size, self.shards.channels), np.uint8)
        labels = np.empty(len(positions), np.int64)
        bad_samples: list[str] = []
        try:
            for row, (position, shard, index) in enumerate(zip(positions, *self.order.locate(positions), strict=True)):
                images[row], labels[row] = self._sample(int(position), int(shard), int(index), bad_samples)
        except DataError as error:
            return error
        return Batch(torch.from_numpy(images), torch.from_numpy(labels), torch.from_numpy(positions), bad_samples)

    def _sample(self, position: int, shard: int, index: int, bad_samples: list[str]) -> tuple[UInt8Array, int]:
        for attempt in range(_MOST_REPLACEMENTS + 1):
            try:
                return self.shards.read(shard, index)
            except ImageError as error:
                bad_samples.append(str(error))
                draw = hash64(self.order.seed, Purpose.REPLACEMENT, position, attempt)
                shard, index = self.shards.shard_and_index(int(draw[0] % np.uint64(self.shards.num_samples)))
        others = f"{_MOST_REPLACEMENTS} replacements could not be decoded either"
        raise DataError(f"{bad_samples[-1]}; {others}; check the shards with tools/index_shards.py --verify")
