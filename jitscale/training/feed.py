"""From shards to the tensors of a step: micro-batches on the device, with their random draws.

Every draw is a function of the run's seed and a sample's position in the global sequence. Therefore a resumed run
repeats nothing and skips nothing, on any number of ranks.

Shapes: B images of a micro-batch, A channels, S pixels per side, K tokens that pass through the routed blocks.
"""

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from jitscale import parallel
from jitscale.config import Config, image_shape, image_tokens, routed_blocks, routed_tokens
from jitscale.data.loader import Batch, ShardLoader
from jitscale.data.order import EpochOrder
from jitscale.data.shards import ShardSet, open_training_shards
from jitscale.diffusion.objective import times_from_normal
from jitscale.keyed_random import Int64Array, Purpose, generator_seeds, hash64, normal, uniform
from jitscale.node import once_a_node
from jitscale.parallel import World
from jitscale.training.noise import add_noise, seeded_noise

T = TypeVar("T")


@dataclass(frozen=True)
class MicroBatch:
    """The inputs of one forward and backward pass, on the device."""

    x: torch.Tensor  # float32 (B, A, S, S), clean images in [-1, 1]
    e: torch.Tensor  # float32 (B, A, S, S), scaled noise
    z: torch.Tensor  # float32 (B, A, S, S), t x + (1 - t) e
    t: torch.Tensor  # float32 (B,) in [0, 1]
    labels: torch.Tensor  # int64 (B,), the null label if the class is dropped
    kept: torch.Tensor | None  # int64 (B, K), ascending: tokens that pass the routed blocks; None: all pass
    bad_samples: list[str]  # why images could not be decoded; another sample replaces each


def open_once_a_node(config: Config, world: World) -> ShardSet:
    """`open_training_shards` on one rank of each node, for all its ranks; a collective call.

    Opening 100,000 shards takes half a minute, and the storage must not serve every rank.
    """

    def opened() -> tuple[ShardSet, ShardSet | None]:
        shards = open_training_shards(config)
        return shards, shards.held_out

    shards, held_out = once_a_node(world, opened)
    shards.held_out = held_out  # pickling a ShardSet drops it
    return shards


class Feed:
    """This rank's micro-batches, from a position in the global sample sequence on."""

    def __init__(
        self, config: Config, world: World, shards: ShardSet, *, micro_batches: int, origin: int, compiled: bool
    ) -> None:
        """`shards` hold the training samples; their epoch 0 begins at position `origin`.

        A step has `micro_batches`; if `compiled`, a compiled kernel adds the noise.
        """
        self._config, self._world, self._shards = config, world, shards
        self._micro_batch_size = config.data.batch_size // world.size // micro_batches
        data = config.data
        self._order = EpochOrder(shards.samples_per_shard, config.run.seed, data.streams, data.window, origin=origin)
        self._add_noise = torch.compile(add_noise) if compiled else add_noise
        self._generator = torch.Generator(world.device)
        self._batches: Generator[Batch, None, None] | None = None

    def start(self, position: int) -> None:
        """Begin, or begin again, at `position`; a collective call.

        Raises a UserError on every rank if shared memory or the cache's disk is too small.
        """
        self.close()
        data, world = self._config.data, self._world
        loader = ShardLoader(
            shard_set=self._shards,
            order=self._order,
            global_batch_size=data.batch_size,
            micro_batch_size=self._micro_batch_size,
            rank=world.rank,
            world_size=world.size,
            start_position=position,
            num_workers=data.num_workers,
            pin_memory=world.device.type == "cuda",
        )
        parallel.raise_together(lambda: loader.check_shared_memory(world.local_size))
        parallel.raise_together(lambda: self._shards.check_cache(loader.shards_side_by_side(world.local_size)))
        self._batches = iter(loader)
        drawn = ((batch, _with_draws(batch, self._config)) for batch in self._batches)
        self._prepared = _copied(drawn, world.device)

    def __next__(self) -> MicroBatch:
        """The next micro-batch; its `bad_samples` name images that could not be decoded.

        Raises a DataError, on this rank only, if a shard cannot be read or a worker has died.
        """
        config = self._config
        with parallel.said_by_this_rank():
            batch, (images, labels, flip, normal_numbers, kept) = next(self._prepared)
        t = times_from_normal(normal_numbers, config.diffusion)
        seeds = generator_seeds(config.run.seed, Purpose.NOISE, batch.positions.numpy())
        noise = seeded_noise(seeds, image_shape(config.model), self._generator)
        x, e, z = self._add_noise(images, flip, noise, t, config.diffusion.noise_scale)
        return MicroBatch(x, e, z, t, labels, kept if kept.shape[1] else None, batch.bad_samples)

    def close(self) -> None:
        """Stop the workers."""
        if self._batches is not None:
            self._batches.close()


def one_ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items, read one ahead: the next item is requested before the current one is yielded."""
    ahead: list[T] = []
    for item in items:
        yield from ahead
        ahead = [item]
    yield from ahead


_Prepared = tuple[Batch, tuple[torch.Tensor, ...]]  # a batch, and the tensors of `_with_draws`


def _with_draws(batch: Batch, config: Config) -> tuple[torch.Tensor, ...]:
    """The images and their random draws, except the noise, which is drawn on the device.

    - images: uint8 (B, S, S, A)
    - labels: int64 (B,), the null label if the class is dropped
    - flip: bool (B,)
    - normal numbers: float32 (B,); `times_from_normal` makes times from them
    - tokens that pass the routed blocks: int64 (B, K); K is 0 if all pass
    """
    seed, positions = config.run.seed, batch.positions.numpy()
    dropped = torch.from_numpy(uniform(seed, Purpose.LABEL_DROP, positions) < config.diffusion.label_drop)
    labels = batch.labels.masked_fill(dropped, config.model.num_classes)
    flip = torch.from_numpy(config.data.flip & (uniform(seed, Purpose.FLIP, positions) < 0.5))
    normal_numbers = torch.from_numpy(normal(seed, Purpose.TIME, positions)).float()
    kept = routed_tokens(config.model) if routed_blocks(config.model) else 0
    return batch.images, labels, flip, normal_numbers, kept_tokens(seed, positions, image_tokens(config.model), kept)


def kept_tokens(seed: int, positions: Int64Array, tokens: int, kept: int) -> torch.Tensor:
    """The `kept` tokens of each image that pass the routed blocks, int64 (B, kept): a function of (seed, position).

    They are ascending in each row, so that tokens stay in their order.
    """
    if kept == 0:
        return torch.empty(len(positions), 0, dtype=torch.int64)
    draws = hash64(seed, Purpose.ROUTE, positions[:, None], np.arange(tokens))
    return torch.from_numpy(np.sort(np.argsort(draws, axis=1, kind="stable")[:, :kept], axis=1))


def _copied(batches: Iterator[_Prepared], device: torch.device) -> Iterator[_Prepared]:
    """The same batches on `device`. The next batch is prepared and copied to a GPU while the current one is used.

    Copies come from page-locked memory; otherwise they would wait for the GPU. Images that the loader has put there
    are not moved again.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)

    def copy(prepared: _Prepared) -> tuple[_Prepared, torch.cuda.Event]:
        batch, tensors = prepared
        with torch.cuda.stream(stream):
            copies = tuple(tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors)
            return (batch, copies), stream.record_event()

    for (batch, tensors), copied in one_ahead(map(copy, batches)):
        current = torch.cuda.current_stream(device)
        current.wait_event(copied)
        for tensor in tensors:
            tensor.record_stream(current)  # the allocator must not reuse its memory before the step is done
        yield batch, tensors
