"""One run of an experiment, in a process of its own: train it, measure its checkpoints, record what came out."""

from __future__ import annotations

import base64
import time
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from jitscale import parallel
from jitscale.config import Config
from jitscale.errors import ExitCode, UserError
from jitscale.evaluation.features import to_uint8
from jitscale.evaluation.final import evaluate_model
from jitscale.evaluation.generate import configured_sampler, generate, ready_to_sample, tile
from jitscale.experiments.running import Run
from jitscale.model.jit import JiT
from jitscale.planner import training_flops
from jitscale.training.checkpoint import Checkpoint, complete_checkpoints, prune
from jitscale.training.trainer import train
from jitscale.upgrade import plan_upgrade
from jitscale.weights.opening import open_weights, read_weights
from jitscale.weights.stored import StoredWeights
from jitscale.weights.upgraded import write_upgraded

ALL = 10**9


def execute(run: Run, folder: Path) -> dict[str, Any]:
    """Train `run` in `folder` to its end, from where it was left, and measure it.

    Returns:
        `flops_an_image` of training, `training_seconds`, `measuring_seconds` and `measurements`, a list of what
        evaluate_model returns, each with the `images` seen and the `strip`, a PNG in base64, if there is one.

    Raises:
        UserError: it cannot be trained, or was asked to stop.
    """
    world = parallel.start(parallel.choose_device("cpu"))
    config = run.load(folder, "evaluation.at_end=false", f"checkpoint.keep_last={ALL}")
    if run.measured_every is not None:
        config.checkpoint.every_images = run.measured_every
    started = time.perf_counter()
    code = train(config, world, _beginning(run, folder, config))
    if code != ExitCode.DONE:
        raise UserError(f"{run.name}: was asked to stop; the same command goes on")
    trained = time.perf_counter()
    run_dir = Path(config.run.dir)
    checkpoints = complete_checkpoints(run_dir)
    measured = checkpoints[-1:] if run.measured_every is None else checkpoints
    outcome = {
        "flops_an_image": training_flops(config.model),
        "training_seconds": trained - started,
        "measurements": [_measure(checkpoint, run, folder) for checkpoint in measured],
        "measuring_seconds": time.perf_counter() - trained,
    }
    prune(run_dir, keep_last=1)
    return outcome


def _beginning(run: Run, folder: Path, config: Config) -> StoredWeights | None:
    """Write the upgraded checkpoint that the run goes on from, or return the upgraded weights that it starts from."""
    if run.upgraded_from is None:
        return None
    target = config
    if run.as_initial:
        target = replace(config, run=replace(config.run, dir=f"{config.run.dir}/upgraded"))
    if not complete_checkpoints(Path(target.run.dir)):
        low = open_weights(folder / run.upgraded_from)
        write_upgraded(low, target, plan_upgrade(low.config, target, run.kernel), keep_moments=run.keep_moments)
    return open_weights(target.run.dir) if run.as_initial else None


def _measure(path: Path, run: Run, folder: Path) -> dict[str, Any]:
    world = parallel.start(parallel.choose_device("cpu"))
    config = run.load(folder, *run.evaluation)
    weights = read_weights(path, config.evaluation.weights)
    model = ready_to_sample(weights.build(), config, world.device)
    result = evaluate_model(model, weights.name, config, world, folder / "measured")
    numbers = {key: value for key, value in result.items() if key != "protocol"}
    if run.strip:
        numbers["strip"] = _strip(model, config, run.strip)
    return {"images": Checkpoint(path).progress.images, "weights": weights.name, **numbers}


def _strip(model: JiT, config: Config, images: int) -> str:
    sampler = configured_sampler(config.evaluation, model.diffusion)
    drawn = to_uint8(generate(model, sampler, range(images), config.evaluation.seed))
    png = BytesIO()
    Image.fromarray(tile(drawn, images)).save(png, format="png")
    return base64.b64encode(png.getvalue()).decode()
