"""One training run of a study: train it, measure its checkpoints, record the numbers."""

import base64
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from jitscale import parallel
from jitscale.checkpoints.format import Checkpoint, complete_checkpoints
from jitscale.checkpoints.opening import open_weights
from jitscale.checkpoints.saving import prune
from jitscale.checkpoints.upgrade import plan_upgrade, write_upgraded
from jitscale.config import Config, load_config
from jitscale.data.shards import open_training_shards
from jitscale.errors import ExitCode, UserError
from jitscale.evaluation.features import to_uint8
from jitscale.evaluation.final import evaluate_model
from jitscale.evaluation.generate import configured_sampler, generate, ready_on_all_ranks, tile
from jitscale.figures import with_palette
from jitscale.model.flops import mean_training_flops, training_flops
from jitscale.tracking import HELD_OUT
from jitscale.training.held_out import HeldOutLoss
from jitscale.training.trainer import train
from studies.tasks import Task

ROOT = Path(__file__).parents[2]
ALL = 10**9
# In a short training a long average still contains the first weights. That would decide comparisons.
SHORT_AVERAGE = ("ema.decays=[0.98]", "evaluation.weights=ema_0.98")
STRIP_COLOURS = 48  # noise does not compress: docs/experiments would hold hundreds of kilobytes of it
SAMPLING_COST = 10  # to sample and measure one image takes about as long as to train this many


@dataclass(frozen=True)
class Run(Task):
    """One training run and its measurements; with `after`, it starts from that run's last checkpoint, upgraded."""

    config: str  # a file of configs/
    settings: tuple[str, ...] = ()  # dotted; `run.dir` is added
    kernel: str = "nearest"  # kernel of the upgrade
    keep_moments: bool = True  # over the upgrade
    as_initial: bool = False  # start a new run from the upgraded weights by `run.init_from`, instead of a resume
    measured_every: int | None = None  # images between measurements, the upgraded start included; None: at the end only
    evaluation: tuple[str, ...] = ()  # settings of a measurement that differ from those of the training
    strip: int = 0  # a measurement also keeps so many samples (ids 0, 1, ...) as one picture, side by side

    def load(self, folder: Path, *more: str) -> Config:
        """The configuration of the run, in `folder` of the experiment."""
        return load_config(ROOT / "configs" / self.config, [*self.settings, *more, f"run.dir={folder / self.name}"])

    def cost(self, folder: Path) -> int:
        config = self.load(folder)
        images = config.run.max_images or 0
        times = 1 if self.measured_every is None else 1 + images // self.measured_every
        return images + SAMPLING_COST * config.evaluation.num_images * times

    def execute(self, folder: Path) -> dict[str, Any]:
        """Train to the end (after an interruption, the rest) and measure.

        The outcome has `flops_an_image` of training, `training_seconds`, and `measurements`: a list of results of
        `evaluate_model`, each with the `images` seen; with a `strip` as a PNG in base64, if one is kept; and with the
        loss `held_out`, if samples are held out. Raises a UserError if the run cannot be trained, or was asked to stop.
        """
        world = parallel.start(parallel.choose_device("cpu"))
        config = self.load(folder, "evaluation.at_end=false", f"checkpoint.keep_last={ALL}")
        if self.measured_every is not None:
            config.checkpoint.every_images = self.measured_every
        started = time.perf_counter()
        self._begin(folder, config)
        if train(config, world) != ExitCode.DONE:
            raise UserError(f"{self.name}: was asked to stop; the same command continues")
        seconds = time.perf_counter() - started
        run_dir = Path(config.run.dir)
        checkpoints = complete_checkpoints(run_dir)
        measured = checkpoints[-1:] if self.measured_every is None else checkpoints
        measurements = [self._measure(checkpoint, folder, world) for checkpoint in measured]
        prune(run_dir, keep_last=1)
        flops = mean_training_flops(config)
        return {"flops_an_image": flops, "training_seconds": seconds, "measurements": measurements}

    def _begin(self, folder: Path, config: Config) -> None:
        """Write the upgraded checkpoint that the run resumes, or set `run.init_from` of `config` to it."""
        if self.after is None:
            return
        initial = replace(config, run=replace(config.run, dir=f"{config.run.dir}/upgraded"))
        target = initial if self.as_initial else config
        if not complete_checkpoints(Path(target.run.dir)):
            low = open_weights(folder / self.after)
            write_upgraded(low, target, plan_upgrade(low.config, target, self.kernel), keep_moments=self.keep_moments)
        if self.as_initial:
            config.run.init_from = target.run.dir

    def _measure(self, path: Path, folder: Path, world: parallel.World) -> dict[str, Any]:
        config = self.load(folder, *self.evaluation)
        weights = config.evaluation.weights
        model = ready_on_all_ranks(open_weights(path).network(weights, world.device), config, world)
        result = evaluate_model(model, weights, config, world, folder / "measured")
        numbers = {key: value for key, value in result.items() if key != "protocol"}
        if self.strip:
            sampler = configured_sampler(config.evaluation, model.diffusion)
            drawn = to_uint8(generate(model, sampler, range(self.strip), config.evaluation.seed))
            png = BytesIO()
            with_palette(Image.fromarray(tile(drawn, self.strip)), STRIP_COLOURS).save(png, format="png", optimize=True)
            numbers["strip"] = base64.b64encode(png.getvalue()).decode()
        if (samples := open_training_shards(config).held_out) is not None:
            losses = HeldOutLoss(config, world, samples).measure(model, weights)
            numbers["held_out"] = losses[f"{HELD_OUT}{weights}"]
        return {"images": Checkpoint(path).progress.images, "weights": weights, **numbers}


def flops_of(config: str, settings: Sequence[str], until: float = 1.0) -> float:
    """Floating-point operations of training an image, if tokens are routed for the share `until` of all images."""
    model = load_config(ROOT / "configs" / config, settings).model
    return until * training_flops(model) + (1 - until) * training_flops(model, routed=False)


def images_at(flops: float, config: str, settings: Sequence[str], until: float = 1.0) -> int:
    """The number of images, in whole batches, whose training takes `flops` operations in all."""
    batch = load_config(ROOT / "configs" / config, settings).data.batch_size
    return int(flops / flops_of(config, settings, until)) // batch * batch


def seeded(what: str, seed: int, config: str, images: int, *settings: str, **options: Any) -> Run:
    """The run of one seed over `images` images."""
    own = (f"run.seed={seed}", f"evaluation.seed={seed}", f"run.max_images={images}")
    return Run(f"{what}_s{seed}", config, (*settings, *own), **options)
