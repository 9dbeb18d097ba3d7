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

CPU = torch.device("cpu")
DEFAULTS = ["engine.precision=fp32", "run.device=cpu", "run.max_steps=1"]  # the overrides win over these


def measured_config(options: argparse.Namespace, settings: list[str]) -> Config:
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


def environment() -> dict[str, Any]:
    """Device, versions, load and date, to be kept with every number."""
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


def peak_memory_mib() -> float:
    """The most memory that this process has held at once (ru_maxrss is in KiB, in bytes on macOS)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
