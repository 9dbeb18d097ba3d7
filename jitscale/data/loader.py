"""Batches of the global sample sequence, for one rank.

Shapes: B images of a micro-batch, S image size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from jitscale.data.order import EpochOrder
from jitscale.data.shards import ShardSet
from jitscale.keyed_random import Int64Array


class Batch(NamedTuple):
    """One micro-batch as it leaves the loader: bytes travel, arithmetic happens on the device.

    Attributes:
        images: (B, S, S, 3) uint8.
        labels: (B,) int64.
        positions: (B,) int64, the samples' global positions, which key every random draw.
    """

    images: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor


class ShardLoader:
    """Micro-batches of one rank, for ever, from any position on.

    A global batch is `global_batch_size` consecutive positions; rank r takes offsets r, r + W, ... of it, and the
    micro-batches are consecutive slices of those. So any number of ranks reads the same global batches. The loader
    keeps no state to resume from: the trainer knows the position from completed steps.
    """

    def __init__(
        self,
        shards: ShardSet,
        order: EpochOrder,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        start_position: int,
        num_workers: int,
        pin_memory: bool,
    ) -> None:
        """The sizes must divide: world_size * micro_batch_size divides global_batch_size."""
        assert global_batch_size % (world_size * micro_batch_size) == 0, "refused by jitscale.config"
        sampler = _PositionSampler(global_batch_size, micro_batch_size, rank, world_size, start_position)
        self._loader: DataLoader[Batch] = DataLoader(
            _ShardDataset(shards, order),
            sampler=sampler,
            batch_size=None,  # the sampler's items are whole micro-batches
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
        )

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._loader)


def to_model_input(images: torch.Tensor, flip: torch.Tensor) -> torch.Tensor:
    """(B, S, S, 3) uint8 to (B, 3, S, S) float32 in [-1, 1], mirrored left to right where `flip` (B,) says so."""
    pixels = images.permute(0, 3, 1, 2).float() / 127.5 - 1.0
    return torch.where(flip.view(-1, 1, 1, 1), pixels.flip(3), pixels)


class _PositionSampler(Sampler[Int64Array]):
    """Positions of this rank's micro-batches, one after the other."""

    def __init__(self, global_batch: int, micro_batch: int, rank: int, world_size: int, start: int) -> None:
        self._global_batch = global_batch
        self._offsets = np.arange(rank, global_batch, world_size, dtype=np.int64).reshape(-1, micro_batch)
        self._start = start

    def __iter__(self) -> Iterator[Int64Array]:
        position = self._start
        while True:
            for offsets in self._offsets:
                yield position + offsets
            position += self._global_batch


class _ShardDataset(Dataset[Batch]):
    """Micro-batches by their positions; lives in a worker process."""

    def __init__(self, shards: ShardSet, order: EpochOrder) -> None:
        self._shards = shards
        self._order = order

    def __getitem__(self, positions: Int64Array) -> Batch:
        shard_numbers, sample_numbers = self._order.locate(positions)
        samples = [self._shards.read(int(s), int(i)) for s, i in zip(shard_numbers, sample_numbers, strict=True)]
        images = np.stack([image for image, _ in samples])
        labels = torch.tensor([label for _, label in samples])
        return Batch(torch.from_numpy(images), labels, torch.from_numpy(positions))
