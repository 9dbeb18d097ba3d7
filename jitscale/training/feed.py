"""From shards to the tensors of a step: micro-batches on the device, with everything that is drawn for them.

Every draw is a function of the run's seed and a sample's position in the global sequence, so that a resumed run repeats
nothing and skips nothing, on any number of ranks.

Shapes: B images of a micro-batch, S pixels a side.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from jitscale import parallel
from jitscale.config import Config
from jitscale.data.loader import Batch, ShardLoader
from jitscale.data.order import EpochOrder
from jitscale.data.shards import ShardSet
from jitscale.diffusion.objective import times_from_normal
from jitscale.keyed_random import Purpose, generator_seeds, normal, uniform
from jitscale.parallel import World
from jitscale.training.noise import add_noise, seeded_noise


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward pass takes, on the device."""

    x: torch.Tensor  # float32 (B, 3, S, S), clean images in [-1, 1]
    e: torch.Tensor  # float32 (B, 3, S, S), scaled noise
    z: torch.Tensor  # float32 (B, 3, S, S), t x + (1 - t) e
    t: torch.Tensor  # float32 (B,) in [0, 1]
    labels: torch.Tensor  # int64 (B,), the null label where the class is dropped
    bad_samples: list[str]  # why images could not be decoded; others stand in for them


class Feed:
    """This rank's micro-batches, from a position in the global sample sequence on."""

    def __init__(
        self, config: Config, world: World, shards: ShardSet, *, micro_batches: int, origin: int, compiled: bool
    ) -> None:
        """
        Args:
            config: the run's.
            world: this rank.
            shards: the training samples.
            micro_batches: in a step.
            origin: the position where epoch 0 of these shards begins.
            compiled: whether noise is added by a compiled kernel.
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

        Raises:
            UserError: on every rank: shared memory or the cache's disk is too small.
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
        self._drawn = _copy_ahead((_draw(batch, self._config) for batch in self._batches), world.device)

    def __next__(self) -> MicroBatch:
        """The next micro-batch; images that could not be decoded are named in it."""
        drawn, config = next(self._drawn), self._config
        t = times_from_normal(drawn.normal, config.diffusion)
        seeds = generator_seeds(config.run.seed, Purpose.NOISE, drawn.positions)
        noise = seeded_noise(seeds, config.model.image_size, self._generator)
        x, e, z = self._add_noise(drawn.images, drawn.flip, noise, t, config.diffusion.noise_scale)
        return MicroBatch(x, e, z, t, drawn.labels, drawn.bad_samples)

    def close(self) -> None:
        """Stop the workers."""
        if self._batches is not None:
            self._batches.close()


@dataclass
class _Drawn:
    """A batch and what was drawn for it, but the noise, which is drawn on the device."""

    images: torch.Tensor  # uint8 (B, S, S, 3)
    labels: torch.Tensor  # int64 (B,), the null label where the class is dropped
    flip: torch.Tensor  # bool (B,)
    normal: torch.Tensor  # float32 (B,), from which times are made
    positions: npt.NDArray[np.int64]  # (B,), in the global sequence
    bad_samples: list[str]


_COPIED = ("images", "labels", "flip", "normal")  # to the device


def _draw(batch: Batch, config: Config) -> _Drawn:
    seed, positions = config.run.seed, batch.positions.numpy()
    dropped = torch.from_numpy(uniform(seed, Purpose.LABEL_DROP, positions) < config.diffusion.label_drop)
    return _Drawn(
        images=batch.images,
        labels=batch.labels.masked_fill(dropped, config.model.num_classes),
        flip=torch.from_numpy(config.data.flip & (uniform(seed, Purpose.FLIP, positions) < 0.5)),
        normal=torch.from_numpy(normal(seed, Purpose.TIME, positions)).float(),
        positions=positions,
        bad_samples=batch.bad_samples,
    )


def _copy_ahead(drawn: Iterator[_Drawn], device: torch.device) -> Iterator[_Drawn]:
    """The same batches on `device`; a GPU's next one is drawn and copied while the current one is used.

    Copies are made from page-locked memory, or they would wait for the GPU. Images that lie there already are not
    moved.
    """
    if device.type != "cuda":
        yield from drawn
        return
    stream = torch.cuda.Stream(device)

    def copy(one: _Drawn) -> tuple[_Drawn, torch.cuda.Event]:
        with torch.cuda.stream(stream):
            copies = {name: getattr(one, name).pin_memory().to(device, non_blocking=True) for name in _COPIED}
            return replace(one, **copies), stream.record_event()

    def ready(one: _Drawn, copied: torch.cuda.Event) -> _Drawn:
        current = torch.cuda.current_stream(device)
        current.wait_event(copied)
        for name in _COPIED:
            getattr(one, name).record_stream(current)  # its memory is not given away while the step uses it
        return one

    ahead = None
    for one in drawn:
        following = copy(one)
        if ahead is not None:
            yield ready(*ahead)
        ahead = following
    if ahead is not None:
        yield ready(*ahead)
