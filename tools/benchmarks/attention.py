"""Attention kernels at the shapes of a configuration: forward, and forward with backward."""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.conditions import arithmetic, environment, measured_config, peak_memory_mib
from benchmarks.stopwatch import wait_for
from benchmarks.utilisation import describe_utilisation, matmul_tflops, utilisation
from jitscale.errors import ConfigError
from jitscale.model.attention import KERNELS, choose_kernel
from jitscale.parallel import choose_device


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every kernel that works here, in turns; those that do not with the reason."""
    config = measured_config(options, [], on_gpu=True)
    device, model = choose_device(config.run.device), config.model
    tokens = (model.image_size // model.patch_size) ** 2 + model.in_context_len
    head_dim = model.hidden_size // model.num_heads
    dtype = arithmetic(config)
    dropout = model.attn_dropout if options.dropout is None else options.dropout
    shape = (options.batch, tokens, model.num_heads, head_dim)
    missing: dict[str, str] = {}
    times: dict[str, dict[str, list[float]]] = {}
    peaks: dict[str, float] = {}
    for name in KERNELS:
        try:
            choose_kernel(
                name,
                tokens=[tokens],
                heads=model.num_heads,
                head_dim=head_dim,
                dropouts=[dropout],
                dtype=dtype,
                device=device,
            )
            times[name] = {"forward": [], "backward": []}
        except ConfigError as error:
            missing[name] = str(error)
    qkv = torch.randn(*shape[:2], 3, *shape[2:], device=device, dtype=dtype, requires_grad=True)
    gradient = torch.randn(shape, device=device, dtype=dtype)
    for turn in tqdm(range(options.repeats + 1), unit="turn", desc="measure", disable=None):
        for name, found in times.items():
            wait_for(device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            started = time.perf_counter()
            q, k, v = qkv.unbind(2)
            out = KERNELS[name](q, k, v, dropout)
            wait_for(device)
            halfway = time.perf_counter()
            torch.autograd.grad(out, qkv, gradient)
            wait_for(device)
            if turn > 0:  # the first is the warm-up
                found["forward"].append(halfway - started)
                found["backward"].append(time.perf_counter() - halfway)
            if device.type == "cuda":  # of the CPU's memory only the whole process's peak is known
                peaks[name] = peak_memory_mib(device)
    # Two products forward and four backward; that a kernel computes some of them again counts for nothing.
    flops = {"forward": 4 * options.batch * model.num_heads * tokens**2 * head_dim}
    flops["backward"] = 2 * flops["forward"]
    product = matmul_tflops(device, dtype)
    milliseconds = {
        name: {part: 1e3 * statistics.median(values) for part, values in found.items()} for name, found in times.items()
    }
    return {
        "config": options.config,
        "overrides": options.overrides,
        "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "dropout": dropout,
        "kernels": {
            name: {
                "ms": ms,
                "images_per_second": 1e3 * options.batch / sum(ms.values()),
                "peak_memory_mib": peaks.get(name),
                **{part: utilisation(flops[part] / ms[part] / 1e9, device, product) for part in ms},
            }
            for name, ms in milliseconds.items()
        },
        "missing": missing,
        "matmul_tflops_per_second": product,
        "peak_memory_mib": peak_memory_mib(device),
        **environment(device),
    }


def describe(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The lines of the table of `measure`."""
    batch, tokens, heads, head_dim = result["shape"]
    lines = [("shape", f"{batch} x {tokens} x {heads} x {head_dim}, {result['dtype']}, dropout {result['dropout']}")]
    for name, found in result["kernels"].items():
        lines.append((f"{name}: images/s of one layer", f"{found['images_per_second']:.4g}"))
        for part, ms in found["ms"].items():
            lines.append((f"{name}: {part}", f"{ms:.3f} ms"))
            used = describe_utilisation(found[part], result["matmul_tflops_per_second"])
            lines += [(f"{name}: {part}, {label}", value) for label, value in used]
        if found["peak_memory_mib"] is not None:
            lines.append((f"{name}: peak memory", f"{found['peak_memory_mib']:.0f} MiB"))
    lines.append(("peak memory", f"{result['peak_memory_mib']:.0f} MiB"))
    return [*lines, *((name, reason) for name, reason in result["missing"].items())]
