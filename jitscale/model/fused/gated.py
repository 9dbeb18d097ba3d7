"""The gate of the feed-forward layer, silu(gate) * value, with dropout: Triton kernels.

Computed in float32 and rounded once. The forward pass reads the two halves and writes their product. The backward pass
reads the halves and the product's gradient, and writes the gradient of both halves.

Shapes: M rows, I inner width.
"""

# Kernels are written in Triton's language: no types, and constants in capitals.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: N803

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton
from triton.runtime.jit import JITFunction

from jitscale.model.fused.dropping import dropping, kept, random_words


class Launch(NamedTuple):
    """Launch parameters of a kernel."""

    columns: int  # columns for each program, which has 8 rows
    warps: int  # warps of one program


FORWARD = Launch(columns=512, warps=2)
BACKWARD = Launch(columns=512, warps=2)
GROUP = 8  # rows of a program: one call of the random generator gives 128 bits, 16 for each row of a column


@triton.jit
def _random(seed, group, column, THRESHOLD: tl.constexpr):
    """Four words (columns,): row 2 i of the group takes the low half of word i, row 2 i + 1 the high half."""
    if THRESHOLD > 0:
        return random_words(tl.load(seed), column, group)
    else:
        return column, column, column, column


@triton.jit
def _forward_one(gate, value, half, THRESHOLD: tl.constexpr, SCALE: tl.constexpr):
    gate = gate.to(tl.float32)
    return kept(gate * tl.sigmoid(gate) * value.to(tl.float32), half, THRESHOLD, SCALE)


@triton.jit
def _backward_one(g, gate, value, half, THRESHOLD: tl.constexpr, SCALE: tl.constexpr):
    """Gradients of gate and value."""
    g = kept(g.to(tl.float32), half, THRESHOLD, SCALE)
    gate = gate.to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    return g * value.to(tl.float32) * sigmoid * (1.0 + gate * (1.0 - sigmoid)), g * gate * sigmoid


@triton.jit
def _forward_pair(h, y, row, rows, column, word, WIDTH: tl.constexpr, THRESHOLD: tl.constexpr, SCALE: tl.constexpr):
    """Two rows: all loads are issued before the first store."""
    mask_a = (column < WIDTH) & (row < rows)
    mask_b = (column < WIDTH) & (row + 1 < rows)
    source = h + row * (2 * WIDTH) + column
    gate_a = tl.load(source, mask=mask_a, other=0.0)
    value_a = tl.load(source + WIDTH, mask=mask_a, other=0.0)
    gate_b = tl.load(source + 2 * WIDTH, mask=mask_b, other=0.0)
    value_b = tl.load(source + 3 * WIDTH, mask=mask_b, other=0.0)
    target = y + row * WIDTH + column
    y_a = _forward_one(gate_a, value_a, word, THRESHOLD, SCALE)
    y_b = _forward_one(gate_b, value_b, word >> 16, THRESHOLD, SCALE)
    tl.store(target, y_a.to(y.dtype.element_ty), mask=mask_a)
    tl.store(target + WIDTH, y_b.to(y.dtype.element_ty), mask=mask_b)


@triton.jit
def _backward_pair(
    dy, h, dh, row, rows, column, word, WIDTH: tl.constexpr, THRESHOLD: tl.constexpr, SCALE: tl.constexpr
):
    mask_a = (column < WIDTH) & (row < rows)
    mask_b = (column < WIDTH) & (row + 1 < rows)
    place = row * (2 * WIDTH) + column
    source = dy + row * WIDTH + column
    g_a = tl.load(source, mask=mask_a, other=0.0)
    gate_a = tl.load(h + place, mask=mask_a, other=0.0)
    value_a = tl.load(h + place + WIDTH, mask=mask_a, other=0.0)
    g_b = tl.load(source + WIDTH, mask=mask_b, other=0.0)
    gate_b = tl.load(h + place + 2 * WIDTH, mask=mask_b, other=0.0)
    value_b = tl.load(h + place + 3 * WIDTH, mask=mask_b, other=0.0)
    gate_a, value_a = _backward_one(g_a, gate_a, value_a, word, THRESHOLD, SCALE)
    gate_b, value_b = _backward_one(g_b, gate_b, value_b, word >> 16, THRESHOLD, SCALE)
    tl.store(dh + place, gate_a.to(dh.dtype.element_ty), mask=mask_a)
    tl.store(dh + place + WIDTH, value_a.to(dh.dtype.element_ty), mask=mask_a)
    tl.store(dh + place + 2 * WIDTH, gate_b.to(dh.dtype.element_ty), mask=mask_b)
    tl.store(dh + place + 3 * WIDTH, value_b.to(dh.dtype.element_ty), mask=mask_b)


@triton.jit
def _forward(
    h,  # (M, 2 I), contiguous like y
    seed,  # (1,), int64
    y,  # (M, I)
    rows,
    WIDTH: tl.constexpr,  # I
    COLUMNS: tl.constexpr,
    THRESHOLD: tl.constexpr,
    SCALE: tl.constexpr,
):
    blocks: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    group = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    row = group.to(tl.int64) * 8
    a, b, c, d = _random(seed, group, column, THRESHOLD)
    _forward_pair(h, y, row, rows, column, a, WIDTH, THRESHOLD, SCALE)
    _forward_pair(h, y, row + 2, rows, column, b, WIDTH, THRESHOLD, SCALE)
    _forward_pair(h, y, row + 4, rows, column, c, WIDTH, THRESHOLD, SCALE)
    _forward_pair(h, y, row + 6, rows, column, d, WIDTH, THRESHOLD, SCALE)


@triton.jit
def _backward(
    dy,  # (M, I), contiguous like all tensors here
    h,  # (M, 2 I)
    seed,  # (1,), int64
    dh,  # (M, 2 I)
    rows,
    WIDTH: tl.constexpr,  # I
    COLUMNS: tl.constexpr,
    THRESHOLD: tl.constexpr,
    SCALE: tl.constexpr,
):
    blocks: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    group = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    row = group.to(tl.int64) * 8
    a, b, c, d = _random(seed, group, column, THRESHOLD)
    _backward_pair(dy, h, dh, row, rows, column, a, WIDTH, THRESHOLD, SCALE)
    _backward_pair(dy, h, dh, row + 2, rows, column, b, WIDTH, THRESHOLD, SCALE)
    _backward_pair(dy, h, dh, row + 4, rows, column, c, WIDTH, THRESHOLD, SCALE)
    _backward_pair(dy, h, dh, row + 6, rows, column, d, WIDTH, THRESHOLD, SCALE)


COMPILED = isinstance(_forward, JITFunction)  # False: Triton's interpreter runs the kernels, for tests on CPUs


def _shape(h: Tensor, dropout: float, columns: int) -> tuple[int, int, dict[str, Any]]:
    """M, the number of programs, and the kernels' constants."""
    inner = h.shape[-1] // 2
    rows = h.numel() // (2 * inner)
    constants = {"WIDTH": inner, "COLUMNS": columns, **dropping(dropout)}
    return rows, (rows + GROUP - 1) // GROUP * ((inner + columns - 1) // columns), constants


def forward(h: Tensor, seed: Tensor | None, dropout: float, launch: Launch = FORWARD) -> Tensor:
    """(..., 2 I) -> (..., I)"""
    rows, programs, constants = _shape(h, dropout, launch.columns)
    h = h.contiguous()
    y = h.new_empty((*h.shape[:-1], h.shape[-1] // 2))
    kernel = wrap_triton(_forward) if COMPILED else _forward
    kernel[(programs,)](h, h if seed is None else seed, y, rows, **constants, num_warps=launch.warps)
    return y


def backward(dy: Tensor, h: Tensor, seed: Tensor | None, dropout: float, launch: Launch = BACKWARD) -> Tensor:
    """The gradient of h (..., 2 I) from that of y (..., I)."""
    rows, programs, constants = _shape(h, dropout, launch.columns)
    dy, h = dy.contiguous(), h.contiguous()
    dh = torch.empty_like(h)
    kernel = wrap_triton(_backward) if COMPILED else _backward
    kernel[(programs,)](dy, h, h if seed is None else seed, dh, rows, **constants, num_warps=launch.warps)
    return dh


@triton_op("jitscale::gated", mutates_args=())
def gated_with_seed(h: Tensor, seed: Tensor | None, dropout: float) -> Tensor:
    """silu(gate) * value (..., I) of the halves of `h` (..., 2 I), in its dtype; `seed` is None without dropout."""
    return forward(h, seed, dropout)


@triton_op("jitscale::gated_backward", mutates_args=())
def gated_backward(dy: Tensor, h: Tensor, seed: Tensor | None, dropout: float) -> Tensor:
    return backward(dy, h, seed, dropout)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor | None, float], output: Tensor) -> None:
    h, seed, ctx.dropout = inputs
    ctx.save_for_backward(h, seed)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
    return gated_backward(dy, *ctx.saved_tensors, ctx.dropout), None, None


gated_with_seed.register_autograd(_differentiate, setup_context=_keep)


def gated(h: Tensor, dropout: float) -> Tensor:
    """silu(gate) * value (..., I) of the halves of `h` (..., 2 I), in its dtype, with inverted dropout.

    The probability is rounded to a multiple of 2^-16. The seed is drawn from the default generator of the device.
    """
    seed = torch.randint(2**62, (1,), device=h.device) if dropout > 0 else None
    return gated_with_seed(h, seed, dropout)
