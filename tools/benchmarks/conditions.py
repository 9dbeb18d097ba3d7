"""What all measurements share: the configuration to measure, and the machine it was measured on."""

from __future__ import annotations

import argparse
import os
import platform
import resource
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from jitscale.config import Config, load_config
from jitscale.errors import ConfigError
from jitscale.parallel import choose_device
from jitscale.versions import version_of

CPU = torch.device("cpu")
DEFAULTS = ["run.max_steps=1"]  # the overrides win over these
ON_CPU = ["engine.precision=fp32", "run.device=cpu"]


def measured_config(options: argparse.Namespace, settings: list[str], *, on_gpu: bool = False) -> Config:
    """The configuration to measure; `settings` and --batch win over everything.

    Args:
        options: of the command line.
        settings: dotted.
        on_gpu: whether this measurement can run on a GPU; it does where there is one.

    Raises:
        ConfigError: it is impossible, or asks for what is not measured here.
    """
    defaults = DEFAULTS if on_gpu and torch.cuda.is_available() else [*DEFAULTS, *ON_CPU]
    config = load_config(options.config, [*defaults, *options.overrides, *settings, f"data.batch_size={options.batch}"])
    device = choose_device(config.run.device)
    if device.type != "cpu" and not on_gpu:
        raise ConfigError(f"run.device={config.run.device}: only the CPU is measured; remove it")
    if device.type == "cpu" and config.engine.precision == "bf16":
        raise ConfigError("engine.precision=bf16: is not measured on CPUs; set fp32 or autocast")
    return config


def environment(device: torch.device = CPU) -> dict[str, Any]:
    """Device, versions, load and date, to be kept with every number."""
    known: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "date": datetime.now(timezone.utc).date().isoformat(),
    }
    if device.type == "cuda":
        known |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    for package in ("deepspeed", "flash-attn", "flash-attn-4", "torchao"):
        if (version := version_of(package)) is not None:
            known[package] = version
    return known


def _processor() -> str:
    """The processor's name as the kernel gives it."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def peak_memory_mib(device: torch.device = CPU) -> float:
    """The most memory that tensors on a GPU, or on CPUs this process (ru_maxrss), have held at once."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KiB, in bytes on macOS
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def arithmetic(config: Config) -> torch.dtype:
    """What the matrix products of a configuration are computed in."""
    return torch.float32 if config.engine.precision == "fp32" else torch.bfloat16
