"""Train two hundred steps on handwritten digits, on the device and on the CPU: the losses must be nearly equal.

`training` uses the same network, optimizer and noise in plain torch on both. `training-zero` is the trainer itself: its
noise is drawn on the device, so the two agree only on average.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import measuring
from benchmarks.correct import Comparison, result_of
from jitscale.config import Config, DiffusionConfig
from jitscale.diffusion.objective import sample_loss, times_from_normal
from jitscale.errors import UserError
from jitscale.evaluation.generate import autocast
from jitscale.model.execution import prepare
from jitscale.model.jit import JiT
from jitscale.preparation.digits import DIGIT_CLASSES, digit_images
from jitscale.training.noise import add_noise
from jitscale.training.optim import build_optimizer

ROOT = Path(__file__).parents[2]
CONFIG = "configs/demo.yaml"
STEPS = {"smoke": 4, "whole": 200}
BATCH = {"smoke": 8, "whole": 64}
WINDOW = {"smoke": 2, "whole": 20}  # steps whose losses are averaged
WARM_UP_STEPS = 50
LIMIT, LIMIT_OTHER_NOISE = 0.03, 0.12  # relative
CPU = torch.device("cpu")


def measure(options: argparse.Namespace, config: Config, device: torch.device) -> dict[str, Any]:
    """Compare the losses of both, averaged over windows of steps."""
    size = "smoke" if options.smoke else "whole"
    train = _by_the_trainer if options.case == "training-zero" else _plainly
    curves = {"device": train(device, size), "CPU": train(CPU, size)}
    limit = LIMIT_OTHER_NOISE if options.case == "training-zero" else LIMIT
    pairs = zip(_windows(curves["device"], size), _windows(curves["CPU"], size), strict=True)
    comparisons = [
        Comparison(f"loss until step {(i + 1) * WINDOW[size]}", abs(a / b - 1), limit, f"{a:.4f}, CPU {b:.4f}")
        for i, (a, b) in enumerate(pairs)
    ]
    return result_of(comparisons, curves=curves)


def _windows(losses: list[float], size: str) -> list[float]:
    steps = WINDOW[size]
    return [sum(losses[i : i + steps]) / steps for i in range(0, len(losses) - steps + 1, steps)]


def _plainly(device: torch.device, size: str) -> list[float]:
    """The loss of every step: bf16 arithmetic and compiled blocks on a GPU, float32 on the CPU."""
    arithmetic = ["engine.precision=fp32"] if device.type == "cpu" else ["engine.precision=autocast"]
    config = measuring.read_config(CONFIG, ["run.max_steps=1000", f"data.batch_size={BATCH[size]}", *arithmetic])
    images, labels = digit_images(config.model.image_size)
    torch.manual_seed(config.run.seed)
    network = JiT(config.model, config.diffusion).to(device).train()
    execution = prepare(network, config.engine, device, training=True)
    optimizer = build_optimizer(network, config.optim)
    draws = torch.Generator().manual_seed(0)  # on the CPU, so that both see the same
    losses = []
    for step in range(STEPS[size]):
        chosen = torch.randint(len(images), (config.data.batch_size,), generator=draws)
        x, e, z, t = (each.to(device) for each in _noised(torch.from_numpy(images)[chosen], config.diffusion, draws))
        with autocast(config, device):
            prediction = network(z, t, torch.from_numpy(labels)[chosen].to(device))
        loss = sample_loss(prediction, x, e, z, t, config.diffusion).mean()
        loss.backward()
        warmed = min(1.0, (step + 1) / WARM_UP_STEPS)
        for group in optimizer.param_groups:
            group["lr"] = warmed * config.optim.lr * group["lr_factor"]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    print(f"{device}: {execution}", file=sys.stderr)
    return torch.stack(losses).float().tolist()


def _noised(images: torch.Tensor, diffusion: DiffusionConfig, draws: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Image, noise and mixture (B, A, S, S) each, and times (B,), of images (B, S, S, A)."""
    batch, height, width, channels = images.shape
    noise = torch.randn(batch, channels, height, width, generator=draws)
    t = times_from_normal(torch.randn(batch, generator=draws), diffusion)
    return *add_noise(images, torch.zeros(batch, dtype=torch.bool), noise, t, diffusion.noise_scale), t


def _by_the_trainer(device: torch.device, size: str) -> list[float]:
    """The same by `python -m jitscale.train`, from shards, in a process of its own."""
    from jitscale.preparation.array_shards import write_shards  # noqa: PLC0415 (webdataset, which may be missing)

    with tempfile.TemporaryDirectory() as scratch:
        config = measuring.read_config(CONFIG, ["tracking.wandb=off"])
        images, labels = digit_images(config.model.image_size)
        shards, run = Path(scratch, "shards"), Path(scratch, "run")
        write_shards(
            images,
            output=shards,
            labels=labels,
            class_names=DIGIT_CLASSES,
            codec="raw",
            samples_per_shard=256,
        )
        settings = {
            "data": [f"shards={shards}", f"batch_size={BATCH[size]}", "num_workers=0"],
            "optim": [f"warmup_images={WARM_UP_STEPS * BATCH[size]}"],
            "run": [f"dir={run}", f"device={device.type}", f"max_steps={STEPS[size]}", "max_images=null"],
            "tracking": ["wandb=off", "log_every_steps=1"],
            "evaluation": ["at_end=false", "grid_every_images=0"],
            "checkpoint": ["every_images=1000000000"],
            "engine": [f"precision={'fp32' if device.type == 'cpu' else 'autocast'}"],
        }
        dotted = [f"{group}.{each}" for group, own in settings.items() for each in own]
        command = [sys.executable, "-m", "jitscale.train", "--config", CONFIG, *dotted]
        finished = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False)
        if finished.returncode:
            raise UserError(f"training on {device.type} ended with code {finished.returncode}; see above")
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines if "loss" in line]
