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
from jitscale.diffusion.objective import sample_loss
from jitscale.errors import UserError
from jitscale.evaluation.generate import autocast
from jitscale.model.execution import Execution, prepare
from jitscale.model.flops import training_flops
from jitscale.model.jit import JiT
from jitscale.training.noise import add_noise

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
TRAINER_NEEDS = ("deepspeed", "fsspec", "PIL", "safetensors", "simplejpeg", "wandb")  # beside what all measurements do
STEPS_AT_ONCE = {"cpu": 1, "cuda": 5}  # between two waits for the device
WAITING_OPERATORS = {"_local_scalar_dense", "nonzero", "equal"}
WAITING_CALLS = {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"}


class Training(Protocol):
    """What is measured: training steps whose parts are timed by a stopwatch that was given to it."""

    execution: Execution

    def step(self) -> None:
        """One optimizer step."""

    def close(self) -> None:
        """Release what is held."""


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Training steps, in turns with the plain network's forward and backward pass, and with the authors' steps."""
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
            peak = peak_memory_mib(device)  # of training alone: what follows is built beside it
            result = _take_turns(ours, watch, options, config, device)
            ours.close()
        finally:
            parallel.stop()
    tflops = result["images_per_second"] * training_flops(config.model) / 1e12
    product = matmul_tflops(device, arithmetic(config))
    return {
        "config": options.config,
        "overrides": options.overrides,
        "batch": options.batch,
        "steps": options.steps,
        "engine": f"ZeRO stage {config.engine.zero_stage}" if whole else _plain(missing),
        "execution": str(ours.execution),
        **result,
        **utilisation(tflops, device, product),
        "matmul_tflops_per_second": product,
        "peak_memory_mib": peak,
        **environment(device),
    }


def _plain(missing: list[str]) -> str:
    return "plain torch" + (f", since this machine lacks {', '.join(missing)}" if missing else "")


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
        *(
            (
                label,
                f"{result['ms'][name]:.1f} ms, {result['share'][name]:.1%}" if name in result["ms"] else "not there",
            )
            for name, label in PARTS.items()
        ),
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


def _take_turns(
    ours: Training, watch: Stopwatch, options: argparse.Namespace, config: Config, device: torch.device
) -> dict[str, Any]:
    network = JiT(config.model, config.diffusion).to(device).train()
    prepare(network, config.engine, device, training=True)
    theirs = ReferenceTraining(config, device) if options.compare == "reference" else None
    random = RandomBatch(config, device)
    at_once = STEPS_AT_ONCE[device.type]
    their_watch = Stopwatch(device, enabled=False)
    whole: list[float] = []
    their_whole: list[float] = []

    def plain_passes() -> None:
        flip, noise, t = random.draw()
        x, e, z = add_noise(random.images, flip, noise, t, config.diffusion.noise_scale)
        with watch.part("forward"), autocast(config, device):
            prediction = network(z, t, random.labels)
        loss = sample_loss(prediction, x, e, z, t, config.diffusion).mean()
        with watch.part("backward"):
            loss.backward()
        network.zero_grad()

    def their_step() -> None:
        if theirs is not None:
            flip, noise, t = random.draw()
            theirs.step(random.images, flip, noise, t, random.labels, their_watch)

    def timed(step: Callable[[], None], into: list[float]) -> None:
        wait_for(device)
        started = time.perf_counter()
        for _ in range(at_once):
            step()
        wait_for(device)
        into.append((time.perf_counter() - started) / at_once)

    plain_passes()
    their_step()
    waits = host_waits(ours.step, device, compiled=ours.execution.compiled)
    for _ in trange(options.steps, unit="step", desc="measure", disable=None):
        timed(ours.step, whole)
        if theirs is not None:
            timed(their_step, their_whole)
        watch.enabled = their_watch.enabled = True
        their_step()
        with watch.part("step"):
            ours.step()
        plain_passes()
        watch.enabled = their_watch.enabled = False
    seconds = {name: statistics.median(measured) for name, measured in watch.times.items()}
    step, detailed = statistics.median(whole), seconds.pop("step")
    parts = {name: value for name, value in seconds.items() if name != "engine_backward"}
    parts["zero_backward"] = seconds["engine_backward"] - seconds["backward"]
    parts["rest"] = detailed - sum(parts.values())
    result = {
        "images_per_second": options.batch / step,
        "ms_per_step": 1e3 * step,
        "ms_per_step_range": [1e3 * min(whole), 1e3 * max(whole)],
        "host_waits": waits,
        "ms": {name: 1e3 * parts[name] for name in PARTS if name in parts},
        "share": {name: parts[name] / detailed for name in PARTS if name in parts},
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
