"""Attention kernels at the shapes of a configuration: forward and backward."""

import argparse
from typing import Any

import torch
from tqdm import trange

from benchmarks.measuring import Stopwatch, Table, measured_config, peak_memory_mib
from benchmarks.utilisation import arithmetic, describe_utilisation, matmul_tflops, utilisation
from jitscale.errors import ConfigError
from jitscale.model.attention import KERNELS, choose_kernel
from jitscale.parallel import choose_device


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every kernel that works here, in turns; the others with the reason."""
    config = measured_config(options, [], on_gpu=True)
    device, model, dtype = choose_device(config.run.device), config.model, arithmetic(config)
    tokens = (model.image_size // model.patch_size) ** 2 + model.in_context_len
    heads, head_dim = model.num_heads, model.hidden_size // model.num_heads
    dropout = model.attn_dropout if options.dropout is None else options.dropout
    shape = (options.batch, tokens, heads, head_dim)
    wanted: dict[str, Any] = {"tokens": [tokens], "heads": heads, "head_dim": head_dim, "dropouts": [dropout]}
    watches, missing = {}, {}
    for name in KERNELS:
        try:
            choose_kernel(name, **wanted, dtype=dtype, device=device)
            watches[name] = Stopwatch(device, enabled=False)
        except ConfigError as error:
            missing[name] = str(error)
    peaks: dict[str, float] = {}
    qkv = torch.randn(*shape[:2], 3, *shape[2:], device=device, dtype=dtype, requires_grad=True)
    gradient = torch.randn(shape, device=device, dtype=dtype)
    for _ in trange(options.repeats + 1, unit="turn", desc="measure", disable=None):
        for name, watch in watches.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            with watch.part("forward"):
                q, k, v = qkv.unbind(2)
                out = KERNELS[name](q, k, v, dropout)
            with watch.part("backward"):
                torch.autograd.grad(out, qkv, gradient)
            if device.type == "cuda":  # on a CPU only the peak of the whole process is known
                peaks[name] = peak_memory_mib(device)
            watch.enabled = True  # the first turn was the warm-up
    # Two products forward, four backward. Products that a kernel computes again do not count.
    flops = {"forward": 4 * options.batch * heads * tokens**2 * head_dim}
    flops["backward"] = 2 * flops["forward"]
    product = matmul_tflops(config, device)
    seconds = {name: watch.medians() for name, watch in watches.items()}
    return {
        "config": options.config,
        "overrides": options.overrides,
        "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "dropout": dropout,
        "kernels": {
            name: {
                "ms": {part: 1e3 * value for part, value in parts.items()},
                "images_per_second": options.batch / sum(parts.values()),
                "peak_memory_mib": peaks.get(name),
                **{part: utilisation(flops[part] / value / 1e12, device, product) for part, value in parts.items()},
            }
            for name, parts in seconds.items()
        },
        "missing": missing,
        "matmul_tflops_per_second": product,
        "peak_memory_mib": peak_memory_mib(device),
    }


def describe(result: dict[str, Any]) -> Table:
    """The lines of the table of `measure`."""
    shape = " x ".join(map(str, result["shape"]))
    lines = [("shape", f"{shape}, {result['dtype']}, dropout {result['dropout']}")]
    for name, found in result["kernels"].items():
        lines.append((f"{name}: images/s of one layer", f"{found['images_per_second']:.4g}"))
        for part, ms in found["ms"].items():
            lines.append((f"{name}: {part}", f"{ms:.3f} ms"))
            used = describe_utilisation(found[part], result["matmul_tflops_per_second"])
            lines += [(f"{name}: {part}, {label}", value) for label, value in used]
        if found["peak_memory_mib"] is not None:
            lines.append((f"{name}: peak memory", f"{found['peak_memory_mib']:.0f} MiB"))
    return [*lines, *result["missing"].items()]
