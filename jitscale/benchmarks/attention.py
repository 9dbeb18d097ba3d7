"""Attention kernels at the shapes of a configuration: forward, and forward with backward."""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from tqdm import tqdm

from jitscale.benchmarks.conditions import environment, measured_config
from jitscale.benchmarks.stopwatch import wait_for
from jitscale.errors import ConfigError
from jitscale.model.attention import KERNELS, choose_kernel
from jitscale.parallel import choose_device


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every kernel that works here, in turns; those that do not with the reason."""
    config = measured_config(options, [], on_gpu=True)
    device, model = choose_device(config.run.device), config.model
    tokens = (model.image_size // model.patch_size) ** 2 + model.in_context_len
    head_dim = model.hidden_size // model.num_heads
    dtype = torch.float32 if config.engine.precision == "fp32" else torch.bfloat16
    dropout = model.attn_dropout if options.dropout is None else options.dropout
    shape = (options.batch, tokens, model.num_heads, head_dim)
    missing: dict[str, str] = {}
    times: dict[str, dict[str, list[float]]] = {}
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
            times[name] = {"forward": [], "both": []}
        except ConfigError as error:
            missing[name] = str(error)
    qkv = torch.randn(*shape[:2], 3, *shape[2:], device=device, dtype=dtype, requires_grad=True)
    gradient = torch.randn(shape, device=device, dtype=dtype)
    for turn in tqdm(range(options.repeats + 1), unit="turn", desc="measure", disable=None):
        for name, found in times.items():
            wait_for(device)
            started = time.perf_counter()
            q, k, v = qkv.unbind(2)
            out = KERNELS[name](q, k, v, dropout)
            wait_for(device)
            halfway = time.perf_counter()
            torch.autograd.grad(out, qkv, gradient)
            wait_for(device)
            if turn > 0:  # the first is the warm-up
                found["forward"].append(halfway - started)
                found["both"].append(time.perf_counter() - started)
    flops = 4 * options.batch * model.num_heads * tokens**2 * head_dim
    return {
        "config": options.config,
        "overrides": options.overrides,
        "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "dropout": dropout,
        "kernels": {
            name: {
                "ms": {part: 1e3 * statistics.median(values) for part, values in found.items()},
                "forward_tflops_per_second": flops / statistics.median(found["forward"]) / 1e12,
            }
            for name, found in times.items()
        },
        "missing": missing,
        **environment(device),
    }


def describe(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The lines of the table of `measure`."""
    batch, tokens, heads, head_dim = result["shape"]
    lines = [("shape", f"{batch} x {tokens} x {heads} x {head_dim}, {result['dtype']}, dropout {result['dropout']}")]
    for name, found in result["kernels"].items():
        forward, both = found["ms"]["forward"], found["ms"]["both"]
        rate = found["forward_tflops_per_second"]
        lines.append((name, f"{forward:.3f} ms forward ({rate:.3g} TFLOP/s), {both:.3f} ms with backward"))
    return [*lines, *((name, reason) for name, reason in result["missing"].items())]
