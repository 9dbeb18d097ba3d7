"""Attention kernels at the shapes of a configuration: forward and backward."""

import argparse
from typing import Any

import torch
from tqdm import trange

from benchmarks import measuring
from jitscale.config import image_tokens
from jitscale.errors import ConfigError
from jitscale.model.attention import KERNELS, choose_kernel


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Time every kernel that works here, in turns; for each of the others, keep the reason."""
    config, device = measuring.measured_config(options, [], on_gpu=True)
    model, dtype = config.model, measuring.arithmetic(config)
    tokens = image_tokens(model) + model.in_context_len
    heads, head_dim = model.num_heads, model.hidden_size // model.num_heads
    dropout = model.attn_dropout if options.dropout is None else options.dropout
    shape = (options.batch, tokens, heads, head_dim)
    wanted: dict[str, Any] = {"tokens": [tokens], "heads": heads, "head_dim": head_dim, "dropouts": [dropout]}
    wanted["batch"] = options.batch
    watches, missing = {}, {}
    for name in KERNELS:
        try:
            choose_kernel(name, **wanted, dtype=dtype, device=device)
            watches[name] = measuring.Stopwatch(device, enabled=False)
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
                peaks[name] = measuring.peak_memory_mib(device)
            watch.enabled = True  # the first turn was the warm-up
    # Two products forward, four backward. If a kernel computes a product again, that one does not count.
    tflop = {"forward": 4 * options.batch * heads * tokens**2 * head_dim / 1e12}
    tflop["backward"] = 2 * tflop["forward"]
    product = measuring.matmul_tflops(config, device)
    kernels = {}
    for name, watch in watches.items():
        seconds = watch.medians()
        kernels[name] = {
            "ms": {part: 1e3 * value for part, value in seconds.items()},
            "images_per_second": options.batch / sum(seconds.values()),
            "peak_memory_mib": peaks.get(name),
            **{part: measuring.utilisation(tflop[part] / value, device, product) for part, value in seconds.items()},
        }
    return {
        "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "dropout": dropout,
        "kernels": kernels,
        "missing": missing,
        "matmul_tflops_per_second": product,
        "peak_memory_mib": measuring.peak_memory_mib(device),
    }


def describe(result: dict[str, Any]) -> measuring.Table:
    """The lines of the table of `measure`."""
    shape = " x ".join(map(str, result["shape"]))
    lines = [("shape", f"{shape}, {result['dtype']}, dropout {result['dropout']}")]
    for name, found in result["kernels"].items():
        lines.append((f"{name}: images/s of one layer", f"{found['images_per_second']:.4g}"))
        for part, ms in found["ms"].items():
            lines.append((f"{name}: {part}", f"{ms:.3f} ms"))
            used = measuring.describe_utilisation(found[part], result["matmul_tflops_per_second"])
            lines += [(f"{name}: {part}, {label}", value) for label, value in used]
        if found["peak_memory_mib"] is not None:
            lines.append((f"{name}: peak memory", f"{found['peak_memory_mib']:.0f} MiB"))
    return [*lines, *result["missing"].items()]
