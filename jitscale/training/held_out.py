"""The loss on samples that are never trained on, at fixed times and with fixed noise.

The training loss varies with the times and the noise of every batch, and the network has seen the images. Here the
samples, their times and their noise are the same at every measurement and for every weight set. Therefore the numbers
are comparable within a run and between runs. They show whether the network generalises, and which average is best.

Shapes: B samples of a block, K times, A channels, H rows, W columns.
"""

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from jitscale import parallel
from jitscale.config import Config, image_shape
from jitscale.data.images import ImageError, UInt8Array
from jitscale.data.shards import ShardSet
from jitscale.diffusion.objective import sample_loss
from jitscale.errors import DataError
from jitscale.evaluation.generate import autocast
from jitscale.keyed_random import Float64Array, Int64Array, Purpose, generator_seeds
from jitscale.model.jit import JiT
from jitscale.parallel import World
from jitscale.tracking import HELD_OUT
from jitscale.training.feed import one_ahead
from jitscale.training.noise import add_noise, seeded_noise

logger = logging.getLogger(__name__)

TIMES = tuple((k + 0.5) / 8 for k in range(8))  # the middles of eight equal intervals; t = 1 is clean

_MOST_REASONS = 10  # warnings about bad images of one rank


@dataclass(frozen=True)
class _Block:
    """Samples that go through the network together."""

    ids: Int64Array  # (B,), numbers of held-out samples; the last block is padded with numbers beyond the last sample
    images: UInt8Array  # (B, H, W, A)
    labels: Int64Array  # (B,)
    sound: list[int]  # the rows whose image could be decoded
    bad: list[str]  # why the other images could not be decoded


@dataclass(eq=False)
class HeldOutLoss:
    """Measures weight sets on held-out samples.

    Samples form blocks of `evaluation.block_size`; ranks take blocks in turn. A block always has the same shape, and
    the noise of a sample is a function of (`evaluation.seed`, its number, the number of the time). Therefore no loss
    depends on the number of ranks. Nothing here draws from a generator that training uses.
    """

    config: Config
    world: World
    samples: ShardSet  # the held-out samples
    stop: Callable[[], None] = lambda: None  # called before every block; an exception from it ends the measurement
    _reasons: set[str] = field(default_factory=set)  # warnings about bad images so far

    def measure(self, network: JiT, name: str) -> dict[str, float | int | None]:
        """The losses of the weight set `name`; `network` comes from `ready_on_all_ranks`. A collective call.

        Returns on every rank:
        - `held_out/<name>`: the mean loss over samples and times
        - `held_out/<name>/t0.0625`, ...: the mean over samples at each of `TIMES`
        - `held_out_samples` and `held_out_bad_samples`: the numbers of measured and of undecodable samples

        It is the training loss, in the space `diffusion.loss`, but without flips, dropped labels and dropout. Raises a
        DataError on every rank if a shard cannot be read, or no image can be decoded.
        """
        started = time.perf_counter()
        losses, bad = self._losses(network)
        mean = float(losses.mean())
        if self.world.is_main:
            seconds = time.perf_counter() - started
            logger.info("held-out loss of %s: %.4g on %d samples (%.1f s)", name, mean, len(losses), seconds)
        by_time = zip(TIMES, losses.mean(axis=0).tolist(), strict=True)
        return {
            "held_out_samples": len(losses),
            "held_out_bad_samples": bad,
            f"{HELD_OUT}{name}": mean,
            **{f"{HELD_OUT}{name}/t{t}": loss for t, loss in by_time},
        }

    def _losses(self, network: JiT) -> tuple[Float64Array, int]:
        """The loss of each decodable sample at each time, (samples, K), in order; the number of undecodable samples."""
        size, world = self.config.evaluation.block_size, self.world
        count = -(-self.samples.num_samples // size)

        def own() -> list[tuple[Float64Array, int]]:
            numbers = range(world.rank, count, world.size)
            with ThreadPoolExecutor(1) as thread:  # reads the next block while the device computes
                reading = one_ahead(thread.submit(self._read, number) for number in numbers)
                blocks = (block.result() for block in reading)
                return [(self._block_losses(network, block), len(block.bad)) for block in blocks]

        by_rank = parallel.gather_objects(parallel.raise_together(own))
        in_order = [by_rank[number % world.size][number // world.size] for number in range(count)]
        losses, bad = np.concatenate([part for part, _ in in_order]), sum(bad for _, bad in in_order)
        if not len(losses):
            what = f"data.held_out={self.config.data.held_out}: none of {bad} images can be decoded"
            raise DataError(f"{what}; check the shards with tools/index_shards.py --verify")
        return losses, bad

    def _read(self, number: int) -> _Block:
        samples, size = self.samples, self.config.evaluation.block_size
        ids = np.arange(number * size, (number + 1) * size)
        images = np.zeros((size, samples.image_size, samples.image_size, samples.channels), np.uint8)
        labels, sound, bad = np.zeros(size, np.int64), [], []
        for row, sample in enumerate(ids[ids < samples.num_samples].tolist()):
            try:
                images[row], labels[row] = samples.read(*samples.shard_and_index(sample))
                sound.append(row)
            except ImageError as error:
                bad.append(str(error))
        for reason in bad:
            if reason not in self._reasons and len(self._reasons) < _MOST_REASONS:
                self._reasons.add(reason)
                logger.warning("%s; the held-out loss is measured without it", reason)
        return _Block(ids, images, labels, sound, bad)

    @torch.no_grad()
    def _block_losses(self, network: JiT, block: _Block) -> Float64Array:
        """The losses of the decodable samples, (sound, K)."""
        self.stop()
        config, device = self.config, self.world.device
        generator = torch.Generator(device)
        images, labels = torch.from_numpy(block.images).to(device), torch.from_numpy(block.labels).to(device)
        unflipped = torch.zeros(len(images), dtype=torch.bool, device=device)
        losses = []
        for number, time_of_all in enumerate(TIMES):
            t = torch.full((len(images),), time_of_all, device=device)
            seeds = generator_seeds(config.evaluation.seed, Purpose.HELD_OUT_NOISE, block.ids, number)
            noise = seeded_noise(seeds, image_shape(config.model), generator)
            x, e, z = add_noise(images, unflipped, noise, t, config.diffusion.noise_scale)
            with autocast(config, device):
                prediction = network(z, t, labels)
            losses.append(sample_loss(prediction, x, e, z, t, config.diffusion, network.subspace))
        return torch.stack(losses, dim=1).double().cpu().numpy()[block.sound]
