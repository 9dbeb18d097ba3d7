"""Time training steps and their parts; with --compare, in turns with steps in the authors' way."""

import argparse
import importlib.util
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import trange

from benchmarks import measuring
from benchmarks.authors import authors_step
from benchmarks.measuring import Stopwatch, Table
from benchmarks.plain import RandomBatch, Training, plain_training
from benchmarks.suite_items import TRAINER_NEEDS
from jitscale.config import Config
from jitscale.errors import UserError, first_line
from jitscale.model.execution import prepare
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
STEPS_AT_ONCE = {"cpu": 1, "cuda": 5}  # between two waits for the device
WAITING_OPERATORS = {"_local_scalar_dense", "nonzero", "equal"}
WAITING_CALLS = {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"}

TrainingOf = Callable[[Config, torch.device, Stopwatch], AbstractContextManager[Training]]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Time training steps, in turns with the network's forward and backward pass alone, and with the authors' way."""
    with tempfile.TemporaryDirectory() as scratch:
        training, settings, engine = training_of(options.engine, Path(scratch))
        config, device = measuring.measured_config(options, settings, on_gpu=True)
        torch.manual_seed(config.run.seed)
        watch = Stopwatch(device, enabled=False)
        with training(config, device, watch) as (step, execution):
            for _ in range(options.warmup):
                step()
            measuring.wait_for(device)
            peak = measuring.peak_memory_mib(device)  # peak of training alone, before other networks are built
            waits = host_waits(step, device, compiled=execution.compiled)
            result = _take_turns(step, watch, options, config, device)
    tflops = result["images_per_second"] * training_flops(config.model) / 1e12
    product = measuring.matmul_tflops(config, device)
    return {
        "engine": engine.format(stage=config.engine.zero_stage),
        "execution": str(execution),
        "host_waits": waits,
        **result,
        **measuring.utilisation(tflops, device, product),
        "matmul_tflops_per_second": product,
        "peak_memory_mib": peak,
    }


def training_of(engine: str, scratch: Path) -> tuple[TrainingOf, list[str], str]:
    """The training by `engine` (zero, plain or auto): a context, the settings that it needs, and its name.

    Raises a UserError if ZeRO is requested and packages of the trainer are missing.
    """
    missing = [name for name in TRAINER_NEEDS if importlib.util.find_spec(name) is None]
    if engine == "zero" and missing:
        what = f"--engine zero: the trainer needs {', '.join(missing)}, which this machine lacks"
        raise UserError(f"{what}; install them, or set --engine plain")
    settings = ["engine.micro_batch_size=null", "tracking.wandb=off"]
    if engine == "plain" or missing:
        lacks = f", since this machine lacks {', '.join(missing)}" if missing else ""
        return plain_training, settings, f"plain torch{lacks}"
    # A machine may lack the trainer's packages; everything else can be measured there.
    from benchmarks.whole import settings_in, whole_training  # noqa: PLC0415

    return whole_training, [*settings, *settings_in(scratch)], "ZeRO stage {stage}"


def describe(result: dict[str, Any]) -> Table:
    """The lines of the table of `measure`."""

    def speed(of: dict[str, Any], median: str = "") -> Table:
        low, high = of["ms_per_step_range"]
        step = f"{of['ms_per_step']:.1f} ms{median} ({low:.1f} to {high:.1f})"
        return [("images/s", f"{of['images_per_second']:.4g}"), ("step", step)]

    waits = result["host_waits"]
    lines = [
        *speed(result, f", the median of {result['steps']}"),
        *measuring.describe_utilisation(result, result["matmul_tflops_per_second"]),
        ("engine", result["engine"]),
        ("execution", result["execution"]),
        ("times that the host waits in a step", "not counted" if waits is None else f"{sum(waits.values())}"),
    ]
    ms, share = result["ms"], result["share"]
    lines += [(PARTS[name], f"{ms[name]:.1f} ms, {share[name]:.1%}" if name in ms else "not there") for name in PARTS]
    lines.append(("the engine's cost around the network", f"{result['around_network']:.1%}"))
    if "authors" in result:
        theirs = result["authors"]
        shown = [*speed(theirs), *((name, f"{ms:.1f} ms") for name, ms in theirs["ms"].items())]
        lines += [(f"the authors' way: {label}", value) for label, value in shown]
        lines.append(("ours / the authors' way", f"{result['ratio']:.2f}"))
        lines.append(("forward and backward alone", f"{result['network_ratio']:.2f}"))
    if "authors_missing" in result:
        lines.append(("the authors' way", f"does not fit next to ours: {result['authors_missing']}"))
    return lines


def _take_turns(
    our_step: Callable[[], None], watch: Stopwatch, options: argparse.Namespace, config: Config, device: torch.device
) -> dict[str, Any]:
    """Time whole steps, and in other steps their parts, because timing a part makes the host wait for the device."""
    network = JiT(config.model, config.diffusion).to(device).train()
    prepare(network, config.engine, device, training=True, batch=config.data.batch_size)
    random = RandomBatch(config, device, network.subspace)
    their_watch, whole_steps = Stopwatch(device, enabled=False), Stopwatch(device)
    steps = {"ours": our_step}
    unmeasured = None
    if options.compare == "authors":
        try:
            steps["theirs"] = authors_step(config, device, random, their_watch)
            steps["theirs"]()
        except torch.OutOfMemoryError as error:
            unmeasured = first_line(error)
    if unmeasured is not None:  # outside of the handler, whose traceback keeps the tensors alive
        steps.pop("theirs", None)
        torch.cuda.empty_cache()

    def passes() -> None:
        loss = random.loss(network, watch.part("forward"))
        with watch.part("backward"):
            loss.backward()
        network.zero_grad()

    passes()
    for _ in trange(options.steps, unit="step", desc="measure", disable=None):
        for name, step in steps.items():
            with whole_steps.part(name):
                for _ in range(STEPS_AT_ONCE[device.type]):
                    step()
        watch.enabled = their_watch.enabled = True
        for name, step in steps.items():
            with watch.part(name):
                step()
        passes()
        watch.enabled = their_watch.enabled = False
    seconds = watch.medians()
    detailed, network_seconds = seconds.pop("ours"), seconds["forward"] + seconds["backward"]
    seconds.pop("theirs", None)  # their parts are in their own watch
    # The engine's backward pass contains the network's, which is measured alone.
    seconds["zero_backward"] = seconds.pop("engine_backward") - seconds["backward"]
    seconds["rest"] = detailed - sum(seconds.values())
    speeds = {name: _speed(measured, device, options.batch) for name, measured in whole_steps.times.items()}
    result = {
        **speeds["ours"],
        "ms": {name: 1e3 * value for name, value in seconds.items()},
        "share": {name: value / detailed for name, value in seconds.items()},
        "around_network": (detailed - network_seconds) / detailed,
    }
    if unmeasured is not None:
        result["authors_missing"] = unmeasured
    if "theirs" in speeds:
        parts = their_watch.medians()
        result["authors"] = {**speeds["theirs"], "ms": {name: 1e3 * value for name, value in parts.items()}}
        result["ratio"] = speeds["theirs"]["ms_per_step"] / speeds["ours"]["ms_per_step"]
        result["network_ratio"] = (parts["forward"] + parts["backward"]) / network_seconds
    return result


def _speed(seconds: list[float], device: torch.device, batch: int) -> dict[str, Any]:
    """The speed; each of `seconds` is the time of `STEPS_AT_ONCE` steps."""
    milliseconds = [1e3 * value / STEPS_AT_ONCE[device.type] for value in seconds]
    median = statistics.median(milliseconds)
    return {
        "images_per_second": 1e3 * batch / median,
        "ms_per_step": median,
        "ms_per_step_range": [min(milliseconds), max(milliseconds)],
    }


def host_waits(step: Callable[[], object], device: torch.device, *, compiled: bool) -> dict[str, int] | None:
    """The number of times that the host waits for the device in `step`, by cause; None if it cannot be counted.

    On GPUs, calls of the CUDA library are counted. A CPU never waits, so operators are counted that would wait on a
    GPU. Compiled code hides them, so there the result is None.
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
