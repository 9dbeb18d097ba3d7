"""Micro-batches of one rank, from any position of the global sequence on.

Shapes: B images of a micro-batch, H rows, W columns. G is the global batch, R the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from jitscale.data.order import EpochOrder
from jitscale.data.shards import ShardSet
from jitscale.errors import DataError
from jitscale.keyed_random import Int64Array


@dataclass
class Batch:
    """What one forward pass takes, as stored: pixels travel in 8 bits and become numbers on the device."""

    images: torch.Tensor  # uint8 (B, H, W, 3)
    labels: torch.Tensor  # int64 (B,)
    positions: torch.Tensor  # int64 (B,), in the global sequence

    def pin_memory(self) -> Batch:
        """A copy in page-locked memory; the DataLoader calls this."""
        return Batch(self.images.pin_memory(), self.labels.pin_memory(), self.positions.pin_memory())


@dataclass(frozen=True)
class ShardLoader:
    """An endless iterable of one rank's micro-batches.

    A global batch is the next G positions. Rank r takes offsets r, r + R, r + 2 R, ... of it, and its micro-batches are
    consecutive slices of that list, so any R and any micro-batch size read the same global batches. There is no state
    to save: the trainer knows the position from the steps it completed.

    Attributes:
        shard_set: where the samples are.
        order: which sample stands at which position.
        global_batch_size: G.
        micro_batch_size: B.
        rank: r.
        world_size: R.
        start_position: of the first global batch.
        num_workers: processes that read ahead; 0 reads in this one.
        pin_memory: put batches into page-locked memory.

    Raises:
        DataError: G is not a multiple of R times B; while iterating, a sample that cannot be read.
    """

    shard_set: ShardSet
    order: EpochOrder
    global_batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int
    start_position: int
    num_workers: int
    pin_memory: bool

    def __post_init__(self) -> None:
        together = self.world_size * self.micro_batch_size
        if self.global_batch_size % together != 0:
            raise DataError(
                f"data.batch_size={self.global_batch_size}: is not a multiple of {self.world_size} ranks x "
                f"micro-batch {self.micro_batch_size} = {together}; change one of them"
            )

    def __iter__(self) -> Iterator[Batch]:
        loader: DataLoader[Batch | DataError] = DataLoader(
            _MicroBatches(self.shard_set, self.order),
            sampler=_RankPositions(self),
            batch_size=None,
            num_workers=self.num_workers,  # one endless epoch, so the workers live as long as the iterator
            pin_memory=self.pin_memory,
            generator=torch.Generator(),  # its seed is drawn from here, not from the training process's generator
        )
        for batch in loader:
            if isinstance(batch, DataError):
                raise batch
            yield batch


def to_model_input(images: torch.Tensor, flip: torch.Tensor) -> torch.Tensor:
    """float32 (B, 3, H, W) in [-1, 1] from uint8 `images` (B, H, W, 3), mirrored where `flip` (B,) is true.

    In float32 whatever precision follows, since bf16 arithmetic gives other pixels; and contiguous, since
    noise that is drawn like it must not depend on a memory layout.
    """
    flipped = torch.where(flip[:, None, None, None], images.flip(2), images)
    channels_first = flipped.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return channels_first / 127.5 - 1


@dataclass(frozen=True)
class _RankPositions:
    """The sampler: the positions (B,) of each micro-batch in turn."""

    loader: ShardLoader

    def __iter__(self) -> Iterator[Int64Array]:
        of = self.loader
        for start in count(of.start_position, of.global_batch_size):
            mine = np.arange(start + of.rank, start + of.global_batch_size, of.world_size)
            yield from mine.reshape(-1, of.micro_batch_size)


class _MicroBatches(Dataset["Batch | DataError"]):
    """Batches by their positions, read in the worker."""

    def __init__(self, shards: ShardSet, order: EpochOrder) -> None:
        self.shards, self.order = shards, order

    def __getitem__(self, positions: Int64Array) -> Batch | DataError:
        """A `DataError` is returned: raised here, it would reach the user wrapped in a worker's traceback."""
        size = self.shards.image_size
        images, labels = np.empty((len(positions), size, size, 3), np.uint8), np.empty(len(positions), np.int64)
        try:
            for row, (shard, index) in enumerate(zip(*self.order.locate(positions), strict=True)):
                images[row], labels[row] = self.shards.read(int(shard), int(index))
        except DataError as error:
            return error
        return Batch(torch.from_numpy(images), torch.from_numpy(labels), torch.from_numpy(positions))
