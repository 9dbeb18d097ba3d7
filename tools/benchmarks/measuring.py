"""Shared by all measurements: the measured configuration, facts of the machine, a stopwatch, and utilisation."""

import argparse
import importlib.util
import platform
import re
import resource
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks.bare_config import bare_config
from jitscale.config import Config
from jitscale.errors import ConfigError
from jitscale.model.flops import peak_tflops
from jitscale.parallel import choose_device
from jitscale.versions import version_of

CPU = torch.device("cpu")
DEFAULTS = ["run.max_steps=1"]  # the overrides win over these
ON_CPU = ["engine.precision=fp32", "run.device=cpu"]
PACKAGES = ("deepspeed", "flash-attn", "flash-attn-4", "torchao")
CONDITIONS = ("device", "cuda", "cudnn", "torch", *PACKAGES, "threads", "load", "date")
MATMUL_SIZES = {"cpu": 1536, "cuda": 8192}
MATMUL_SECONDS = 1.0

Table = list[tuple[str, str]]  # labels and values


def measured_config(options: argparse.Namespace, settings: list[str], *, on_gpu: bool) -> tuple[Config, torch.device]:
    """The configuration to measure and its device; `settings` (dotted) and --batch win over everything.

    With `on_gpu`, the measurement uses a GPU if there is one. Raises a ConfigError if the configuration is impossible,
    or if this measurement does not support it.
    """
    defaults = DEFAULTS if on_gpu and torch.cuda.is_available() else [*DEFAULTS, *ON_CPU]
    config = read_config(options.config, [*defaults, *options.overrides, *settings, f"data.batch_size={options.batch}"])
    device = choose_device(config.run.device)
    if device.type != "cpu" and not on_gpu:
        raise ConfigError(f"run.device={config.run.device}: only the CPU is measured; remove it")
    if device.type == "cpu" and config.engine.precision == "bf16":
        raise ConfigError("engine.precision=bf16: is not measured on CPUs; set fp32 or autocast")
    return config, device


def read_config(path: str, settings: list[str]) -> Config:
    """Like `load_config`, but also works where OmegaConf is not installed."""
    if importlib.util.find_spec("omegaconf") is None:
        return bare_config(path, settings)
    from jitscale.config import load_config  # noqa: PLC0415

    return load_config(path, settings)


def environment() -> dict[str, Any]:
    """Device, versions, threads and date, which every result keeps; the device is the GPU if this process used it."""
    gpu = torch.cuda.is_initialized()
    processor = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    cpu = processor[1].strip() if processor else platform.machine()
    known: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if gpu else cpu,
        "cuda": torch.version.cuda if gpu else None,
        "cudnn": torch.backends.cudnn.version() if gpu else None,
        "torch": torch.__version__,
        **{package: version_of(package) for package in PACKAGES},
        "threads": torch.get_num_threads(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }
    return {name: value for name, value in known.items() if value is not None}


def peak_memory_mib(device: torch.device = CPU) -> float:
    """Peak memory: of tensors on a GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # ru_maxrss of a child process starts at its parent's memory, so it is only the second choice.
    found = re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 2**10


class Stopwatch:
    """Durations in seconds by name, one for each execution of a part.

    On GPUs the end of a part waits for its kernels. This wait slows a step down, so whole steps are measured with
    `enabled` off.
    """

    def __init__(self, device: torch.device, *, enabled: bool = True) -> None:
        self.times: dict[str, list[float]] = defaultdict(list)
        self.enabled = enabled
        self._device = device

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time the body of the `with` statement."""
        if not self.enabled:
            yield
            return
        wait_for(self._device)
        started = time.perf_counter()
        yield
        wait_for(self._device)
        self.times[name].append(time.perf_counter() - started)

    def medians(self) -> dict[str, float]:
        """Seconds by name."""
        return {name: statistics.median(measured) for name, measured in self.times.items()}


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has run all of its kernels."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def arithmetic(config: Config) -> torch.dtype:
    """The data type of a configuration's matrix products."""
    return torch.float32 if config.engine.precision == "fp32" else torch.bfloat16


def matmul_tflops(config: Config, device: torch.device) -> float:
    """TFLOP/s of one large matrix product in `arithmetic`: the fastest of those that ran in about a second."""
    size = MATMUL_SIZES[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=arithmetic(config)) for _ in range(2))
    watch, began = Stopwatch(device), time.perf_counter()
    while time.perf_counter() - began < MATMUL_SECONDS:
        with watch.part("product"):
            a @ b
    return 2 * size**3 / min(watch.times["product"]) / 1e12


def utilisation(tflops: float, device: torch.device, product: float) -> dict[str, Any]:
    """Utilisation of the device by `tflops` TFLOP/s; a large matrix product reaches `product` on it."""
    peak = peak_tflops(device)
    mfu = None if peak is None else tflops / peak  # relative to the data sheet's bf16 peak, if it is known
    return {"tflops_per_second": tflops, "mfu": mfu, "mfu_of_matmul": tflops / product}


def describe_utilisation(found: dict[str, Any], product: float) -> Table:
    """The lines of a table of `utilisation`."""
    return [
        ("TFLOP/s", f"{found['tflops_per_second']:.4g}"),
        ("of one large matrix product", f"{found['mfu_of_matmul']:.1%} of {product:.4g}"),
        ("of the data sheet's peak", "not known" if found["mfu"] is None else f"{found['mfu']:.1%}"),
    ]


def describe_conditions(result: dict[str, Any]) -> Table:
    """The lines of a table of `environment`, with the peak memory if it was measured."""
    lines = [(name, str(result[name])) for name in CONDITIONS if name in result]
    memory = result.get("peak_memory_mib")
    return lines if memory is None else [("peak memory", f"{memory:.0f} MiB"), *lines]
