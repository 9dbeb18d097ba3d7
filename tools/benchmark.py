"""What a training step and what sampling cost on this machine's CPU, and where the time goes.

    python tools/benchmark.py step --config configs/jit_b_256.yaml --batch 4
    python tools/benchmark.py sample --config configs/jit_b_256.yaml --batch 4

One process, freshly initialised weights, random images; OMP_NUM_THREADS sets the threads. No shards are read.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from tqdm import trange

from jitscale import parallel
from jitscale.config import Config, load_config
from jitscale.data.loader import to_model_input
from jitscale.diffusion.objective import interpolate, sample_loss, times_from_normal
from jitscale.errors import ConfigError, ExitCode, exit_with_message
from jitscale.evaluation.distributed import autocast
from jitscale.evaluation.generate import configured_sampler, generate
from jitscale.model.jit import JiT
from jitscale.planner import forward_flops, training_flops
from jitscale.tracking import Tracker
from jitscale.training.ema import ShardedEma

CPU = torch.device("cpu")
DEFAULTS = ["engine.precision=fp32", "run.device=cpu", "run.max_steps=1"]  # the overrides win over these

PARTS = {
    "forward": "network forward",
    "backward": "network backward",
    "zero_backward": "ZeRO's part of backward: gradient copies and reduction",
    "optimizer": "optimizer step: gradient norm, AdamW, weights from masters",
    "ema": "averages",
    "tracking": "tracking, logged every step",
    "rest": "rest: inputs, noise, loss, engine around forward",
}


def main() -> int:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    step = commands.add_parser("step", help="training steps through the ZeRO engine")
    step.set_defaults(measure=measure_step, describe=describe_step)
    step.add_argument("--steps", type=_positive, default=10, metavar="N", help="measured steps (default: %(default)s)")
    step.add_argument("--warmup", type=_positive, default=2, metavar="N", help="steps before (default: %(default)s)")

    sample = commands.add_parser("sample", help="guided Heun sampling")
    sample.set_defaults(measure=measure_sample, describe=describe_sample)
    sample.add_argument("--sampler-steps", type=_positive, default=10, metavar="N", help="default: %(default)s")
    sample.add_argument("--guidance", type=float, default=3.0, metavar="W", help="scale; default: %(default)s")

    for command in (step, sample):
        command.add_argument("--config", default="configs/jit_b_256.yaml", metavar="FILE", help="default: %(default)s")
        command.add_argument("--batch", type=_positive, default=4, metavar="B", help="images; default: %(default)s")
        command.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
        command.add_argument("overrides", nargs="*", metavar="group.key=value", help="settings that win over the file")
    options = parser.parse_args()

    environment = _environment()
    result = {**options.measure(options), **environment}
    print(json.dumps(result) if options.json else _table(options.describe(result), environment))
    return ExitCode.DONE


def measure_step(options: argparse.Namespace) -> dict[str, Any]:
    """Training steps through the engine, alternating with the plain network's forward and backward pass."""
    config = _config(options, ["engine.micro_batch_size=null", "tracking.wandb=off"])
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


def measure_sample(options: argparse.Namespace) -> dict[str, Any]:
    """Guided Heun sampling of one batch, as evaluation does it."""
    settings = ["evaluation.method=heun", f"evaluation.steps={options.sampler_steps}"]
    config = _config(options, [*settings, f"evaluation.guidance_scale={options.guidance}"])
    network = JiT(config.model, config.diffusion).eval()
    sampler = configured_sampler(config.evaluation, config.diffusion)
    rows: list[int] = []
    with autocast(config, CPU), torch.no_grad():
        images = torch.zeros(2 * options.batch, 3, config.model.image_size, config.model.image_size)
        network(images, torch.zeros(len(images)), torch.zeros(len(images), dtype=torch.long))  # warm-up
        network.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
        started = time.perf_counter()
        generate(network, sampler, range(options.batch), config.run.seed)
        seconds = time.perf_counter() - started
    return {
        "config": options.config,
        "overrides": options.overrides,
        "batch": options.batch,
        "sampler_steps": options.sampler_steps,
        "guidance": options.guidance,
        "images_per_second": options.batch / seconds,
        "seconds": seconds,
        "evaluations_per_image": sum(rows) / options.batch,
        "tflops_per_second": sum(rows) * forward_flops(config.model) / seconds / 1e12,
        "peak_memory_mib": _peak_memory_mib(),
    }


def describe_step(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The lines of the table of `measure_step`."""
    low, high = result["ms_per_step_range"]
    return [
        ("images/s", f"{result['images_per_second']:.3f}"),
        ("step", f"{result['ms_per_step']:.1f} ms, the median of {result['steps']} ({low:.1f} to {high:.1f})"),
        ("TFLOP/s", f"{result['tflops_per_second']:.4f}"),
        ("peak memory of the process", f"{result['peak_memory_mib']:.0f} MiB"),
        *((label, f"{result['ms'][name]:.1f} ms, {result['share'][name]:.1%}") for name, label in PARTS.items()),
        ("the engine's cost around the network", f"{result['around_network']:.1%}"),
    ]


def describe_sample(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The lines of the table of `measure_sample`."""
    return [
        ("images/s", f"{result['images_per_second']:.4f}"),
        ("time", f"{result['seconds']:.2f} s for {result['batch']} images"),
        ("network evaluations an image", f"{result['evaluations_per_image']:g}"),
        ("TFLOP/s", f"{result['tflops_per_second']:.4f}"),
        ("peak memory of the process", f"{result['peak_memory_mib']:.0f} MiB"),
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
    ema = ShardedEma(config.ema.decays, engine.masters())
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
                ema.update(engine.masters())
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
    peak = _peak_memory_mib()
    network = JiT(config.model, config.diffusion).train()
    plain_passes(network, Stopwatch())
    watch = Stopwatch()
    for _ in trange(steps, unit="step", desc="measure", disable=None):
        engine_step(watch)
        plain_passes(network, watch)
    tracker.close()
    engine.destroy()
    return watch.times, peak


def _config(options: argparse.Namespace, settings: list[str]) -> Config:
    """The configuration to measure; `settings` and --batch win over everything.

    Raises:
        ConfigError: it is impossible, or asks for what is not measured here.
    """
    config = load_config(options.config, [*DEFAULTS, *options.overrides, *settings, f"data.batch_size={options.batch}"])
    if config.run.device != "cpu":
        raise ConfigError(f"run.device={config.run.device}: only the CPU is measured; remove it")
    if config.engine.precision == "bf16":
        raise ConfigError("engine.precision=bf16: is not measured; set fp32 or autocast")
    return config


def _environment() -> dict[str, Any]:
    return {
        "device": _processor(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def _processor() -> str:
    """The processor's name as the kernel gives it."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _peak_memory_mib() -> float:
    """The most memory that this process has held at once (ru_maxrss is in KiB, in bytes on macOS)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _table(lines: list[tuple[str, str]], environment: dict[str, Any]) -> str:
    lines = [*lines, *((name, str(value)) for name, value in environment.items())]
    return "\n".join(["| | |", "|---|---|", *(f"| {label} | {value} |" for label, value in lines)])


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


if __name__ == "__main__":
    exit_with_message(main)
