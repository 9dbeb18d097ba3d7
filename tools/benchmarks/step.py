"""Training steps, and where their time goes; with --compare, in turns with the authors' steps."""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import trange

from benchmarks.conditions import arithmetic, environment, measured_config, peak_memory_mib
from benchmarks.plain import PlainTraining, RandomBatch
from benchmarks.reference import ReferenceTraining
from benchmarks.stopwatch import Stopwatch, wait_for
from benchmarks.utilisation import describe_utilisation, matmul_tflops, utilisation
from jitscale import parallel
from jitscale.config import Config
from jitscale.errors import UserError
from jitscale.model.execution import Execution, prepare
from jitscale.model.flops import training_flops
from jitscale.model.jit import JiT

PARTS = {
    "data": "waiting for data",
    "forward": "network forward",
    "backward": "network backward",
    "zero_backward": "ZeRO's part of backward: gradient copies and reduction",
    "optimizer": "optimizer step: gradient norm, AdamW, weights from masters",
    "ema": "averages",
    "tracking": "tracking, logged every step",
    "rest": "rest: draws, noise, loss, engine around forward",
}
# Packages that only the trainer needs.
TRAINER_NEEDS = ("deepspeed", "fsspec", "PIL", "safetensors", "simplejpeg", "wandb")
STEPS_AT_ONCE = {"cpu": 1, "cuda": 5}  # between two waits for the device
WAITING_OPERATORS = {"_local_scalar_dense", "nonzero", "equal"}
WAITING_CALLS = {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"}


class Training(Protocol):
    """Training steps whose parts are timed by a stopwatch that it was given."""

    execution: Execution

    def step(self) -> None:
        """One optimizer step."""

    def close(self) -> None:
        """Release what is held."""


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Training steps, in turns with forward and backward passes of the network alone, and with the authors' steps."""
    missing = [name for name in TRAINER_NEEDS if importlib.util.find_spec(name) is None]
    if options.engine == "zero" and missing:
        raise UserError(
            f"--engine zero: the trainer needs {', '.join(missing)}, which this machine lacks; install jitscale with "
            "its packages, or choose --engine plain"
        )
    whole = options.engine == "zero" or (options.engine == "auto" and not missing)
    with tempfile.TemporaryDirectory() as scratch:
        settings = ["engine.micro_batch_size=null", "tracking.wandb=off"]
        if whole:
            # The trainer needs packages that a machine may lack, where everything else can be measured.
            from benchmarks.whole import WholeTraining, settings_in  # noqa: PLC0415

            settings += settings_in(Path(scratch))
        config = measured_config(options, settings, on_gpu=True)
        device = parallel.choose_device(config.run.device)
        torch.manual_seed(config.run.seed)
        watch = Stopwatch(device, enabled=False)
        try:
            ours: Training = (WholeTraining if whole else PlainTraining)(config, device, watch)
            for _ in range(options.warmup):
                ours.step()
            wait_for(device)
            peak = peak_memory_mib(device)  # of training alone, before other networks are built
            result = _take_turns(ours, watch, options, config, device)
            ours.close()
        finally:
            parallel.stop()
    tflops = result["images_per_second"] * training_flops(config.model) / 1e12
    product = matmul_tflops(device, arithmetic(config))
    lacks = f", since this machine lacks {', '.join(missing)}" if missing else ""
    return {
        "config": options.config,
        "overrides": options.overrides,
        "batch": options.batch,
        "steps": options.steps,
        "engine": f"ZeRO stage {config.engine.zero_stage}" if whole else f"plain torch{lacks}",
        "execution": str(ours.execution),
        **result,
        **utilisation(tflops, device, product),
        "matmul_tflops_per_second": product,
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
        *describe_utilisation(result, result["matmul_tflops_per_second"]),
        ("peak memory", f"{result['peak_memory_mib']:.0f} MiB"),
        ("engine", result["engine"]),
        ("execution", result["execution"]),
        ("times that the host waits in a step", "not counted" if waits is None else f"{sum(waits.values())}"),
    ]
    for name, label in PARTS.items():
        there = name in result["ms"]
        lines.append((label, f"{result['ms'][name]:.1f} ms, {result['share'][name]:.1%}" if there else "not there"))
    lines.append(("the engine's cost around the network", f"{result['around_network']:.1%}"))
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


def _take_turns(
    ours: Training, watch: Stopwatch, options: argparse.Namespace, config: Config, device: torch.device
) -> dict[str, Any]:
    network = JiT(config.model, config.diffusion).to(device).train()
    prepare(network, config.engine, device, training=True)
    theirs = ReferenceTraining(config, device) if options.compare == "reference" else None
    random = RandomBatch(config, device)
    their_watch = Stopwatch(device, enabled=False)
    our_seconds: list[float] = []
    their_seconds: list[float] = []

    def passes() -> None:
        loss = random.loss(network, watch.part("forward"))
        with watch.part("backward"):
            loss.backward()
        network.zero_grad()

    def their_step() -> None:
        if theirs is not None:
            theirs.step(random, their_watch)

    def timed(step: Callable[[], None], seconds: list[float]) -> None:
        wait_for(device)
        started, at_once = time.perf_counter(), STEPS_AT_ONCE[device.type]
        for _ in range(at_once):
            step()
        wait_for(device)
        seconds.append((time.perf_counter() - started) / at_once)

    passes()
    their_step()
    waits = host_waits(ours.step, device, compiled=ours.execution.compiled)
    for _ in trange(options.steps, unit="step", desc="measure", disable=None):
        timed(ours.step, our_seconds)
        if theirs is not None:
            timed(their_step, their_seconds)
        watch.enabled = their_watch.enabled = True
        their_step()
        with watch.part("step"):
            ours.step()
        passes()
        watch.enabled = their_watch.enabled = False
    seconds = watch.medians()
    detailed, network_seconds = seconds.pop("step"), seconds["forward"] + seconds["backward"]
    # The engine's backward pass contains that of the network, which is measured alone.
    seconds["zero_backward"] = seconds.pop("engine_backward") - seconds["backward"]
    seconds["rest"] = detailed - sum(seconds.values())
    result = {
        **_speed(our_seconds, options.batch),
        "host_waits": waits,
        "ms": {name: 1e3 * seconds[name] for name in PARTS if name in seconds},
        "share": {name: seconds[name] / detailed for name in PARTS if name in seconds},
        "around_network": (detailed - network_seconds) / detailed,
    }
    if theirs is not None:
        parts = their_watch.medians()
        reference = {**_speed(their_seconds, options.batch), "ms": {name: 1e3 * value for name, value in parts.items()}}
        result["reference"] = reference
        result["ratio"] = reference["ms_per_step"] / result["ms_per_step"]
        result["network_ratio"] = (parts["forward"] + parts["backward"]) / network_seconds
    return result


def _speed(seconds: list[float], batch: int) -> dict[str, Any]:
    """The speed of steps that took `seconds` each."""
    median = statistics.median(seconds)
    return {
        "images_per_second": batch / median,
        "ms_per_step": 1e3 * median,
        "ms_per_step_range": [1e3 * min(seconds), 1e3 * max(seconds)],
    }


def host_waits(step: Callable[[], object], device: torch.device, *, compiled: bool) -> dict[str, int] | None:
    """How often the host waits for the device in `step`, by the cause; None where it cannot be counted.

    On GPUs, calls of the driver's library are counted. On CPUs nothing waits, so operators are counted that would wait
    on a GPU; compiled code hides them.
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
