"""Run the trainer itself on shards of random images, and time the parts of its step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from benchmarks.measuring import Stopwatch
from benchmarks.plain import Training
from jitscale import parallel
from jitscale.config import Config, image_shape
from jitscale.data.shards import open_training_shards
from jitscale.preparation.array_shards import write_shards
from jitscale.training.trainer import Trainer

IMAGES_AT_LEAST = 256
SHARDS = 4


def settings_in(scratch: Path) -> list[str]:
    """Settings that put the files and the data of a run into the folder `scratch`."""
    return [f"run.dir={scratch}/run", f"data.shards={scratch}/shards", "data.classes=subset", "run.max_steps=1000000"]


@contextmanager
def whole_training(config: Config, device: torch.device, watch: Stopwatch) -> Iterator[Training]:
    """A step of the trainer, from shards to averages; `config` with `settings_in` a folder.

    `watch` times its parts. Each timed step is also logged, so that tracking is timed; a run logs every hundredth step.
    """
    with parallel.joined(device) as world:
        write_random_shards(config)
        trainer = Trainer(config, world, open_training_shards(config))
        yield step_of(trainer, watch), trainer.engine.execution
        trainer.close()


def write_random_shards(config: Config) -> None:
    """Make the folders of a `config` with `settings_in`, and write the shards."""
    batch, (channels, size, _) = config.data.batch_size, image_shape(config.model)
    count = max(IMAGES_AT_LEAST, 2 * batch)
    noise = np.random.default_rng(0).integers(256, size=(size + count - 1, size, channels), dtype=np.uint8)
    images = sliding_window_view(noise, size, axis=0).transpose(0, 3, 1, 2)  # each starts one row below the one before
    labels = np.arange(count) % max(1, config.model.num_classes)
    write_shards(images, labels, config.data.shards, codec="raw", samples_per_shard=-(-count // SHARDS))
    Path(config.run.dir).mkdir()


def step_of(trainer: Trainer, watch: Stopwatch) -> Callable[[], None]:
    """A step of `trainer` whose parts are timed by `watch`."""
    trainer.part = watch.part

    def step() -> None:
        loss = trainer.train_step()
        if watch.enabled:
            trainer.log(trainer.agree(loss))

    return step
