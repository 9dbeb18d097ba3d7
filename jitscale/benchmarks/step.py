"""Training steps, and where their time goes; on demand beside the authors' way, in turns."""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import trange

from jitscale import parallel
from jitscale.benchmarks.conditions import environment, matmul_tflops, measured_config, peak_memory_mib
from jitscale.benchmarks.plain import PlainEngine
from jitscale.benchmarks.reference import ReferenceTraining
from jitscale.benchmarks.stopwatch import Stopwatch, wait_for
from jitscale.config import Config
from jitscale.diffusion.objective import interpolate, sample_loss, times_from_normal
from jitscale.evaluation.generate import autocast
from jitscale.model.execution import prepare
from jitscale.model.jit import JiT
from jitscale.planner import peak_tflops, training_flops
from jitscale.training.ema import ShardedEma
from jitscale.training.inputs import to_model_input

PARTS = {
    "forward": "network forward",
    "backward": "network backward",
    "zero_backward": "ZeRO's part of backward: gradient copies and reduction",
    "optimizer": "optimizer step: gradient norm, AdamW, weights from masters",
    "ema": "averages",
    "tracking": "tracking, logged every step",
    "rest": "rest: inputs, noise, loss, engine around forward",
}
STEPS_AT_ONCE = {"cpu": 1, "cuda": 5}  # between two waits for the device
WAITING_OPERATORS = {"_local_scalar_dense", "nonzero", "equal"}
WAITING_CALLS = {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Training steps, in turns with the plain network's forward and backward pass, and with the authors' steps."""
    config = measured_config(options, ["engine.micro_batch_size=null", "tracking.wandb=off"], on_gpu=True)
    device = parallel.choose_device(config.run.device)
    present = importlib.util.find_spec("deepspeed") is not None
    sharded = present if options.engine == "auto" else options.engine == "zero"
    torch.manual_seed(config.run.seed)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            ours = Ours(config, device, Path(scratch), sharded=sharded)
            for _ in range(options.warmup):
                ours.step(Stopwatch(device, enabled=False))
            wait_for(device)
            peak = peak_memory_mib(device)  # of training alone: what follows is built beside it
            result = _take_turns(ours, options, config, device)
            ours.close()
    finally:
        parallel.stop()
    tflops = result["images_per_second"] * training_flops(config.model) / 1e12
    datasheet, product = peak_tflops(device), matmul_tflops(device, config.engine.precision)
    return {
        "config": options.config,
        "overrides": options.overrides,
        "batch": options.batch,
        "steps": options.steps,
        "engine": f"ZeRO stage {config.engine.zero_stage}" if sharded else "plain torch",
        "execution": str(ours.engine.execution),
        **result,
        "tflops_per_second": tflops,
        "matmul_tflops_per_second": product,
        "mfu": None if datasheet is None else tflops / datasheet,
        "mfu_of_matmul": tflops / product,
        "peak_memory_mib": peak,
        **environment(device),
    }


def describe(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The lines of the table of `measure`."""
    low, high = result["ms_per_step_range"]
    waits = result["host_waits"]
    lines = [
        ("images/s", f"{result['images_per_second']:.4g}"),
        ("step", f"{result['ms_per_step']:.1f} ms, the median of {result['steps']} ({low:.1f} to {high:.1f})"),
        ("TFLOP/s", f"{result['tflops_per_second']:.4g}"),
        ("of one large matrix product", f"{result['mfu_of_matmul']:.1%} of {result['matmul_tflops_per_second']:.4g}"),
        ("of the data sheet's peak", "not known" if result["mfu"] is None else f"{result['mfu']:.1%}"),
        ("peak memory", f"{result['peak_memory_mib']:.0f} MiB"),
        ("engine", result["engine"]),
        ("execution", result["execution"]),
        ("times that the host waits in a step", "not counted" if waits is None else f"{sum(waits.values())}"),
        *((label, f"{result['ms'][name]:.1f} ms, {result['share'][name]:.1%}") for name, label in PARTS.items()),
        ("the engine's cost around the network", f"{result['around_network']:.1%}"),
    ]
    theirs = result.get("reference")
    if theirs is not None:
        low, high = theirs["ms_per_step_range"]
        lines += [
            ("the authors' way: images/s", f"{theirs['images_per_second']:.4g}"),
            ("the authors' way: step", f"{theirs['ms_per_step']:.1f} ms ({low:.1f} to {high:.1f})"),
            *((f"the authors' way: {name}", f"{ms:.1f} ms") for name, ms in theirs["ms"].items()),
            ("ours / the authors' way", f"{result['ratio']:.2f}"),
            ("forward and backward alone", f"{result['network_ratio']:.2f}"),
        ]
    return lines


class Ours:
    """A training of this project on random images."""

    def __init__(self, config: Config, device: torch.device, run_dir: Path, *, sharded: bool) -> None:
        self.config, self.device = config, device
        network = JiT(config.model, config.diffusion).train()
        self.engine: Any
        self.tracker: Any = None
        if sharded:
            world = parallel.start(device)
            # After parallel.start, because DeepSpeed chooses its accelerator while it is imported.
            from jitscale.tracking import Tracker  # noqa: PLC0415
            from jitscale.training.engine import ZeroEngine  # noqa: PLC0415

            self.engine = ZeroEngine(network, config, world)
            self.tracker = Tracker(config, run_dir, world.is_main, 0)
        else:
            self.engine = PlainEngine(network, config, device)
        self.ema = ShardedEma(config.ema, self.engine.masters())
        batch, size = config.data.batch_size, config.model.image_size
        self.images = torch.randint(256, (batch, size, size, 3), dtype=torch.uint8, device=device)
        self.labels = torch.randint(max(1, config.model.num_classes), (batch,), device=device)

    def draw(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Clean images, noise and times."""
        batch = len(self.images)
        x = to_model_input(self.images, torch.rand(batch, device=self.device) < 0.5)
        e = self.config.diffusion.noise_scale * torch.randn_like(x)
        return x, e, times_from_normal(torch.randn(batch, device=self.device), self.config.diffusion)

    def step(self, watch: Stopwatch) -> None:
        """One optimizer step."""
        started = time.perf_counter()
        batch = len(self.images)
        with watch.part("step"):
            x, e, t = self.draw()
            z = interpolate(x, e, t)
            loss = sample_loss(self.engine(z, t, self.labels), x, e, z, t, self.config.diffusion).mean()
            with watch.part("engine_backward"):
                self.engine.backward(loss)
            with watch.part("optimizer"):
                self.engine.step(self.config.optim.lr)
            with watch.part("ema"):
                self.ema.update(self.engine.masters(), 1, (batch, 2 * batch))
            with watch.part("tracking"):
                if self.tracker is not None and self.device.type == "cpu":  # where reading the loss costs nothing
                    seconds = time.perf_counter() - started
                    values = {"step": 0, "images": batch, "loss": loss.item(), "lr": self.config.optim.lr}
                    values |= {"grad_norm": self.engine.gradient_norm(), "images_per_second": batch / seconds}
                    self.tracker.log({**values, "skipped_steps": 0})

    def close(self) -> None:
        """Release what is held."""
        if self.tracker is not None:
            self.tracker.close()
        self.engine.destroy()


def _take_turns(ours: Ours, options: argparse.Namespace, config: Config, device: torch.device) -> dict[str, Any]:
    network = JiT(config.model, config.diffusion).to(device).train()
    prepare(network, config.engine, device, training=True)
    theirs = ReferenceTraining(config, device) if options.compare == "reference" else None
    at_once = STEPS_AT_ONCE[device.type]
    watch, their_watch, silent = Stopwatch(device), Stopwatch(device), Stopwatch(device, enabled=False)
    whole: list[float] = []
    their_whole: list[float] = []

    def plain_passes(watch: Stopwatch) -> None:
        x, e, t = ours.draw()
        z = interpolate(x, e, t)
        with watch.part("forward"), autocast(config, device):
            prediction = network(z, t, ours.labels)
        loss = sample_loss(prediction, x, e, z, t, config.diffusion).mean()
        with watch.part("backward"):
            loss.backward()
        network.zero_grad()

    def their_step(watch: Stopwatch) -> None:
        if theirs is not None:
            theirs.step(*ours.draw(), ours.labels, watch)

    def timed(step: Any, into: list[float]) -> None:
        wait_for(device)
        started = time.perf_counter()
        for _ in range(at_once):
            step(silent)
        wait_for(device)
        into.append((time.perf_counter() - started) / at_once)

    plain_passes(silent)
    their_step(silent)
    waits = host_waits(lambda: ours.step(silent), device, compiled=ours.engine.execution.compiled)
    for _ in trange(options.steps, unit="step", desc="measure", disable=None):
        timed(ours.step, whole)
        if theirs is not None:
            timed(their_step, their_whole)
            their_step(their_watch)
        ours.step(watch)
        plain_passes(watch)
    seconds = {name: statistics.median(measured) for name, measured in watch.times.items()}
    step, detailed = statistics.median(whole), seconds["step"]
    parts = {**seconds, "zero_backward": seconds["engine_backward"] - seconds["backward"]}
    parts["rest"] = detailed - sum(parts[name] for name in PARTS if name != "rest")
    result = {
        "images_per_second": options.batch / step,
        "ms_per_step": 1e3 * step,
        "ms_per_step_range": [1e3 * min(whole), 1e3 * max(whole)],
        "host_waits": waits,
        "ms": {name: 1e3 * parts[name] for name in PARTS},
        "share": {name: parts[name] / detailed for name in PARTS},
        "around_network": (detailed - seconds["forward"] - seconds["backward"]) / detailed,
    }
    if theirs is not None:
        their_seconds = {name: statistics.median(measured) for name, measured in their_watch.times.items()}
        their_step_seconds = statistics.median(their_whole)
        result["reference"] = {
            "images_per_second": options.batch / their_step_seconds,
            "ms_per_step": 1e3 * their_step_seconds,
            "ms_per_step_range": [1e3 * min(their_whole), 1e3 * max(their_whole)],
            "ms": {name: 1e3 * value for name, value in their_seconds.items()},
        }
        result["ratio"] = their_step_seconds / step
        their_network = their_seconds["forward"] + their_seconds["backward"]
        result["network_ratio"] = their_network / (seconds["forward"] + seconds["backward"])
    return result


def host_waits(step: Callable[[], object], device: torch.device, *, compiled: bool) -> dict[str, int] | None:
    """How often the host waits for the device in `step`, by what makes it wait; None where it cannot be counted.

    On GPUs the calls of the driver's library. On CPUs, where nothing waits, the operators that would: these cannot be
    seen in compiled code.
    """
    if device.type == "cuda":
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            step()
        return {event.key: event.count for event in profiler.key_averages() if event.key in WAITING_CALLS}
    if compiled:
        return None
    with _WaitingOperators() as seen:
        step()
    return dict(seen.found)


class _WaitingOperators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in WAITING_OPERATORS:
            self.found[name] += 1
        return function(*args, **(kwargs or {}))
