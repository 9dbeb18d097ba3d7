"""How much of a device is used: against its data sheet, and against a matrix product measured in the same run."""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.stopwatch import wait_for
from jitscale.model.flops import peak_tflops

MATMUL_SIZES = {"cpu": 1536, "cuda": 8192}
MATMUL_SECONDS = 1.0


def matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of one large matrix product: the fastest in a second or more."""
    size = MATMUL_SIZES[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < MATMUL_SECONDS:
        wait_for(device)
        started = time.perf_counter()
        a @ b
        wait_for(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best / 1e12


def utilisation(tflops: float, device: torch.device, product: float) -> dict[str, Any]:
    """The share of the device that `tflops` TFLOP/s use; a large matrix product reaches `product`.

    Returns:
        `tflops_per_second`, `mfu` (of the data sheet's bf16 peak; None if it is unknown), `mfu_of_matmul`.
    """
    peak = peak_tflops(device)
    return {
        "tflops_per_second": tflops,
        "mfu": None if peak is None else tflops / peak,
        "mfu_of_matmul": tflops / product,
    }


def describe_utilisation(found: dict[str, Any], product: float) -> list[tuple[str, str]]:
    """The lines of a table of `utilisation`."""
    return [
        ("TFLOP/s", f"{found['tflops_per_second']:.4g}"),
        ("of one large matrix product", f"{found['mfu_of_matmul']:.1%} of {product:.4g}"),
        ("of the data sheet's peak", "not known" if found["mfu"] is None else f"{found['mfu']:.1%}"),
    ]
