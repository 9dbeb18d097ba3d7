"""Training steps through the ZeRO engine, and where their time goes."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import trange

from jitscale import parallel
from jitscale.benchmarks.conditions import CPU, measured_config, peak_memory_mib
from jitscale.config import Config
from jitscale.data.loader import to_model_input
from jitscale.diffusion.objective import interpolate, sample_loss, times_from_normal
from jitscale.evaluation.generate import autocast
from jitscale.model.jit import JiT
from jitscale.planner import training_flops
from jitscale.tracking import Tracker
from jitscale.training.ema import ShardedEma

PARTS = {
    "forward": "network forward",
    "backward": "network backward",
    "zero_backward": "ZeRO's part of backward: gradient copies and reduction",
    "optimizer": "optimizer step: gradient norm, AdamW, weights from masters",
    "ema": "averages",
    "tracking": "tracking, logged every step",
    "rest": "rest: inputs, noise, loss, engine around forward",
}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Training steps through the engine, alternating with the plain network's forward and backward pass."""
    config = measured_config(options, ["engine.micro_batch_size=null", "tracking.wandb=off"])
    world = parallel.start(CPU)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            times, peak = _time_steps(config, world, Path(scratch), options.warmup, options.steps)
    finally:
        parallel.stop()

    seconds = {name: statistics.median(measured) for name, measured in times.items()}
    step, forward, backward = seconds["step"], seconds["forward"], seconds["backward"]
    parts = {**seconds, "zero_backward": seconds["engine_backward"] - backward}
    parts["rest"] = step - sum(parts[name] for name in PARTS if name != "rest")
    return {
        "config": options.config,
        "overrides": options.overrides,
        "batch": options.batch,
        "steps": options.steps,
        "images_per_second": options.batch / step,
        "ms_per_step": 1e3 * step,
        "ms_per_step_range": [1e3 * min(times["step"]), 1e3 * max(times["step"])],
        "tflops_per_second": options.batch * training_flops(config.model) / step / 1e12,
        "peak_memory_mib": peak,
        "ms": {name: 1e3 * parts[name] for name in PARTS},
        "share": {name: parts[name] / step for name in PARTS},
        "around_network": (step - forward - backward) / step,
    }


def describe(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The lines of the table of `measure`."""
    low, high = result["ms_per_step_range"]
    return [
        ("images/s", f"{result['images_per_second']:.3f}"),
        ("step", f"{result['ms_per_step']:.1f} ms, the median of {result['steps']} ({low:.1f} to {high:.1f})"),
        ("TFLOP/s", f"{result['tflops_per_second']:.4f}"),
        ("peak memory of the process", f"{result['peak_memory_mib']:.0f} MiB"),
        *((label, f"{result['ms'][name]:.1f} ms, {result['share'][name]:.1%}") for name, label in PARTS.items()),
        ("the engine's cost around the network", f"{result['around_network']:.1%}"),
    ]


class Stopwatch:
    """Durations in seconds by name, one for each time that a part ran."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time the body of the `with` statement."""
        started = time.perf_counter()
        yield
        self.times[name].append(time.perf_counter() - started)


def _time_steps(
    config: Config, world: parallel.World, run_dir: Path, warmup: int, steps: int
) -> tuple[dict[str, list[float]], float]:
    """Durations of the parts of `steps` steps, and the peak memory in MiB of training alone."""
    # After parallel.start, because DeepSpeed chooses its accelerator while it is imported.
    from jitscale.training.engine import ZeroEngine  # noqa: PLC0415

    torch.manual_seed(config.run.seed)
    engine = ZeroEngine(JiT(config.model, config.diffusion).train(), config, world)
    ema = ShardedEma(config.ema, engine.masters())
    tracker = Tracker(config, run_dir, world.is_main, 0)
    batch, size = config.data.batch_size, config.model.image_size
    images = torch.randint(256, (batch, size, size, 3), dtype=torch.uint8)
    labels = torch.randint(max(1, config.model.num_classes), (batch,))

    def draw() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Clean images, noise, noisy images and times."""
        x = to_model_input(images, torch.rand(batch) < 0.5)
        e = config.diffusion.noise_scale * torch.randn_like(x)
        t = times_from_normal(torch.randn(batch), config.diffusion)
        return x, e, interpolate(x, e, t), t

    def engine_step(watch: Stopwatch) -> None:
        started = time.perf_counter()
        with watch.part("step"):
            x, e, z, t = draw()
            loss = sample_loss(engine(z, t, labels), x, e, z, t, config.diffusion).mean()
            with watch.part("engine_backward"):
                engine.backward(loss)
            with watch.part("optimizer"):
                engine.step(config.optim.lr)
            with watch.part("ema"):
                ema.update(engine.masters(), 1, (batch, 2 * batch))
            with watch.part("tracking"):
                seconds = time.perf_counter() - started
                values = {"step": 0, "images": batch, "loss": loss.item(), "lr": config.optim.lr}
                values |= {"grad_norm": engine.gradient_norm(), "images_per_second": batch / seconds}
                tracker.log({**values, "skipped_steps": 0})

    def plain_passes(network: JiT, watch: Stopwatch) -> None:
        x, e, z, t = draw()
        with watch.part("forward"), autocast(config, CPU):
            prediction = network(z, t, labels)
        loss = sample_loss(prediction, x, e, z, t, config.diffusion).mean()
        with watch.part("backward"):
            loss.backward()
        network.zero_grad()

    for _ in range(warmup):
        engine_step(Stopwatch())
    peak = peak_memory_mib()
    network = JiT(config.model, config.diffusion).train()
    plain_passes(network, Stopwatch())
    watch = Stopwatch()
    for _ in trange(steps, unit="step", desc="measure", disable=None):
        engine_step(watch)
        plain_passes(network, watch)
    tracker.close()
    engine.destroy()
    return watch.times, peak
