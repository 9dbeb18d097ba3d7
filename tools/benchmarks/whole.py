"""The trainer itself, on shards of random images, with the parts of its step timed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.stopwatch import Stopwatch
from jitscale import parallel
from jitscale.config import Config
from jitscale.data.images import UInt8Array
from jitscale.data.packing import write_shards
from jitscale.data.shards import open_configured
from jitscale.training.trainer import Trainer

IMAGES_AT_LEAST = 256
SHARDS = 4


@dataclass(frozen=True)
class RandomImages:
    """Images of `size` pixels a side, each from its number."""

    count: int
    size: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int, /) -> UInt8Array:
        return np.random.default_rng(int(index)).integers(256, size=(self.size, self.size, 3), dtype=np.uint8)


def settings_in(scratch: Path) -> list[str]:
    """Settings of a run whose files and data are in the folder `scratch`."""
    places = [f"run.dir={scratch / 'run'}", f"data.shards={scratch / 'shards'}"]
    # The tiny steps at the beginning of a warm-up leave gradients in denormal numbers, on which CPUs are slow.
    return [*places, "run.max_steps=1000000", "optim.warmup_images=0"]


class WholeTraining:
    """Steps of the trainer, from shards to averages."""

    def __init__(self, config: Config, device: torch.device, watch: Stopwatch) -> None:
        """`config` with `settings_in` a folder; `watch` times the parts."""
        world = parallel.start(device)
        images = RandomImages(max(IMAGES_AT_LEAST, 2 * config.data.batch_size), config.model.image_size)
        labels = np.arange(len(images)) % max(1, config.model.num_classes)
        write_shards(images, labels, config.data.shards, codec="raw", samples_per_shard=-(-len(images) // SHARDS))
        Path(config.run.dir).mkdir()
        self._trainer, self._watch = Trainer(config, world, open_configured(config)), watch
        self._trainer.part = watch.part
        self.execution = self._trainer.engine.execution

    def step(self) -> None:
        """One step; logged if its parts are timed, since a run does so every hundred steps only."""
        started = time.perf_counter()
        loss = self._trainer.train_step()
        if self._watch.enabled:
            self._trainer.log(loss, self._trainer.config.data.batch_size / (time.perf_counter() - started))

    def close(self) -> None:
        """Release what is held."""
        self._trainer.close()
