"""How much of a device is used: against its data sheet, and against a matrix product measured in the same run."""

import time
from typing import Any

import torch

from benchmarks.measuring import Stopwatch, Table
from jitscale.config import Config
from jitscale.model.flops import peak_tflops

MATMUL_SIZES = {"cpu": 1536, "cuda": 8192}
MATMUL_SECONDS = 1.0


def arithmetic(config: Config) -> torch.dtype:
    """The type in which a configuration's matrix products are computed."""
    return torch.float32 if config.engine.precision == "fp32" else torch.bfloat16


def matmul_tflops(config: Config, device: torch.device) -> float:
    """TFLOP/s of one large matrix product in `arithmetic`: the fastest in a second or more."""
    size = MATMUL_SIZES[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=arithmetic(config)) for _ in range(2))
    watch, began = Stopwatch(device), time.perf_counter()
    while time.perf_counter() - began < MATMUL_SECONDS:
        with watch.part("product"):
            a @ b
    return 2 * size**3 / min(watch.times["product"]) / 1e12


def utilisation(tflops: float, device: torch.device, product: float) -> dict[str, Any]:
    """The share of the device that `tflops` TFLOP/s use, where a large matrix product reaches `product`.

    Returns:
        `tflops_per_second`, `mfu` (of the data sheet's bf16 peak; None if it is unknown), `mfu_of_matmul`.
    """
    peak = peak_tflops(device)
    return {
        "tflops_per_second": tflops,
        "mfu": None if peak is None else tflops / peak,
        "mfu_of_matmul": tflops / product,
    }


def describe_utilisation(found: dict[str, Any], product: float) -> Table:
    """The lines of a table of `utilisation`."""
    return [
        ("TFLOP/s", f"{found['tflops_per_second']:.4g}"),
        ("of one large matrix product", f"{found['mfu_of_matmul']:.1%} of {product:.4g}"),
        ("of the data sheet's peak", "not known" if found["mfu"] is None else f"{found['mfu']:.1%}"),
    ]
