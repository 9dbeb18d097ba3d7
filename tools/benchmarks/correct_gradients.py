"""Search for values that are not finite in attention's output and gradients: many passes on random inputs."""

import argparse
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.correct import Comparison, result_of
from jitscale.config import Config
from jitscale.errors import first_line
from jitscale.model.attention import KERNELS, Kernel

# Scales of queries and keys, of values, and of the gradient.
SCALES = list(product((0.02, 1.0, 8.0, 60.0), (1e-3, 1.0, 300.0), (1e-6, 1.0)))
PASSES = {"smoke": 2, "whole": 240}  # passes of each kernel and shape
POISON_BYTES = 2**30  # memory filled with NaN and freed, so that a kernel that reads unwritten memory reads NaN


def measure(options: argparse.Namespace, config: Config, device: torch.device) -> dict[str, Any]:
    """Count the passes with results that are not finite, for every kernel and shape."""
    return result_of(list(_search(device, "smoke" if options.smoke else "whole")))


def _search(device: torch.device, size: str) -> Iterator[Comparison]:
    batch, heads, passes = (1, 2, PASSES[size]) if size == "smoke" else (64, 16, PASSES[size])
    for (name, kernel), head_dim, dropout, tokens in product(
        _kernels(device).items(), (64, 80, 104), (0.0, 0.2), (288, 256)
    ):
        label = f"{name}, head dim {head_dim}, dropout {dropout}, {tokens} tokens"
        generator = torch.Generator(device).manual_seed(0)
        bad = torch.zeros(len(SCALES), 2, device=device)
        try:
            for number in range(passes):
                scales = SCALES[number % len(SCALES)]
                poison = device.type == "cuda" and number // len(SCALES) % 2 == 1
                shape = (batch, tokens, heads, head_dim)
                bad[number % len(SCALES)] += _not_finite(kernel, shape, scales, dropout, generator, poison=poison)
        except Exception as error:  # each kernel has its own exceptions for shapes that it does not support
            yield Comparison(label, None, 0.0, first_line(error))
            continue
        found = bad.cpu()
        worst = [f"scales {SCALES[i]}: {int(found[i].sum())}" for i in range(len(SCALES)) if found[i].any()]
        note = f"of {passes} passes; outputs {int(found[:, 0].sum())}, gradients {int(found[:, 1].sum())}"
        yield Comparison(label, float(found.amax(1).sum()), 0.0, "; ".join([note, *worst]))


def _not_finite(
    kernel: Kernel,
    shape: tuple[int, int, int, int],
    scales: tuple[float, float, float],
    dropout: float,
    generator: torch.Generator,
    *,
    poison: bool,
) -> Tensor:
    """Two flags of a pass, (2,) of 0 and 1: the output has a value that is not finite; a gradient has one."""
    batch, tokens, heads, head_dim = shape
    device = generator.device
    packed = torch.randn(batch, tokens, 3, heads, head_dim, device=device, generator=generator)
    packed *= torch.tensor([scales[0], scales[0], scales[1]], device=device)[:, None, None]
    packed = packed.bfloat16().requires_grad_()
    gradient = scales[2] * torch.randn(shape, device=device, generator=generator)
    if poison:
        torch.full((POISON_BYTES // 2,), float("nan"), dtype=torch.bfloat16, device=device)
    q, k, v = packed.unbind(2)
    out = kernel(q, k, v, dropout)
    (found,) = torch.autograd.grad(out, packed, gradient.to(out.dtype))
    return torch.stack([(~each.detach().isfinite()).any().float() for each in (out, found)])


def _kernels(device: torch.device) -> dict[str, Kernel]:
    """On GPUs every real kernel, on CPUs torch's own choice."""
    if device.type != "cuda":
        return {"sdpa": KERNELS["sdpa"]}
    return {name: kernel for name, kernel in KERNELS.items() if name not in ("sdpa", "reference")}
