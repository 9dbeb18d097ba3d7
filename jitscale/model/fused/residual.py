"""Gated residuals and adaptive RMS norms of a block: Triton kernels.

Computed in float32 and rounded once. The forward pass reads the stream and the branch, and writes their sum and its
norm. The backward pass writes the gradients of both. It returns an image's sums over its tokens in parts, which are
added in a fixed order, so that two runs agree bit by bit.

Shapes: B images, N tokens, C hidden size. A program handles one token; in the backward pass, several tokens of one
image.
"""

# Kernels are written in Triton's language: no types, and constants in capitals.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: N803

from typing import Any, NamedTuple, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton
from triton.runtime.jit import JITFunction

from jitscale.model.fused.dropping import dropping, kept, random_words
from jitscale.model.layers import NORM_EPS, ResidualKernels


class Launch(NamedTuple):
    """Launch parameters of a kernel."""

    warps: int  # warps of one program
    tokens: int = 1  # tokens for each program, one after the other
    stages: int = 1  # depth of the software pipeline: tokens that are loaded ahead


FORWARD = Launch(warps=4)
# The fastest of the tested parameters, on an H200, for 64 x 288 tokens of width 768 and 1280. Loading ahead matters
# most.
BACKWARD = {1024: Launch(warps=4, tokens=36, stages=3)}  # key: C, rounded up to a power of two
WIDE_BACKWARD = Launch(warps=4, tokens=72, stages=4)


@triton.jit
def _bits(seed, row, BLOCK: tl.constexpr):
    """16 random bits for each element of a row, (BLOCK,)."""
    # One call of the generator returns 128 bits, for eight elements.
    a, b, c, d = random_words(seed, tl.arange(0, BLOCK // 8), row.to(tl.int32))
    word = tl.join(tl.join(a, b), tl.join(c, d))
    return tl.reshape(tl.join(word & 0xFFFF, word >> 16), (BLOCK,))


@triton.jit
def _forward(
    x, branch, gate, weight, shift, scale, seed, out, y, tokens, width, gate_stride, shift_stride, scale_stride,
    THRESHOLD: tl.constexpr, SCALE: tl.constexpr, EPS: tl.constexpr, BRANCH: tl.constexpr, NORM: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    image = row // tokens
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    value = tl.load(x + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    if BRANCH:
        added = tl.load(branch + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        if THRESHOLD > 0:
            added = kept(added, _bits(tl.load(seed), row, BLOCK), THRESHOLD, SCALE)
        added *= tl.load(gate + image * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = (value + added).to(out.dtype.element_ty)
        tl.store(out + row * width + columns, rounded, mask=inside)
        value = rounded.to(tl.float32)
    if NORM:
        normed = value * tl.rsqrt(tl.sum(value * value) / width + EPS)
        normed *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
        factor = 1.0 + tl.load(scale + image * scale_stride + columns, mask=inside, other=0.0).to(tl.float32)
        offset = tl.load(shift + image * shift_stride + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + row * width + columns, (normed * factor + offset).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    grad_out, grad_y, x, branch, gate, weight, scale, seed, grad_x, grad_branch, sums, tokens, width, parts,
    gate_stride, scale_stride, THRESHOLD: tl.constexpr, SCALE: tl.constexpr, EPS: tl.constexpr, BRANCH:
    tl.constexpr, NORM: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    by_gate = tl.zeros((BLOCK,), tl.float32)
    by_shift = tl.zeros((BLOCK,), tl.float32)
    by_scale = tl.zeros((BLOCK,), tl.float32)
    if NORM:
        factor = 1.0 + tl.load(scale + image * scale_stride + columns, mask=inside, other=0.0).to(tl.float32)
        factor *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if BRANCH:
        gated = tl.load(gate + image * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if THRESHOLD > 0:
        drawn = tl.load(seed)
    for number in tl.range(0, ROWS, num_stages=STAGES):
        token = part * ROWS + number
        here = inside & (token < tokens)
        row = image * tokens + token
        places = row * width + columns
        gradient = tl.zeros((BLOCK,), tl.float32)
        if BRANCH:
            gradient = tl.load(grad_out + places, mask=here, other=0.0).to(tl.float32)
        if NORM:
            value = tl.load(x + places, mask=here, other=0.0).to(tl.float32)
            of_y = tl.load(grad_y + places, mask=here, other=0.0).to(tl.float32)
            inverse = tl.rsqrt(tl.sum(value * value) / width + EPS)
            normed = value * inverse
            by_shift += of_y
            by_scale += of_y * normed
            of_normed = of_y * factor
            gradient += inverse * (of_normed - normed * (tl.sum(of_normed * normed) / width))
            tl.store(grad_x + places, gradient.to(grad_x.dtype.element_ty), mask=here)
        if BRANCH:
            added = tl.load(branch + places, mask=here, other=0.0).to(tl.float32)
            of_branch = gradient
            if THRESHOLD > 0:
                of_branch = kept(gradient, _bits(drawn, row, BLOCK), THRESHOLD, SCALE)
            by_gate += of_branch * added
            tl.store(grad_branch + places, (of_branch * gated).to(grad_branch.dtype.element_ty), mask=here)
    target = sums + (image * parts + part) * width + columns
    step = tl.num_programs(1).to(tl.int64) * parts * width
    if NORM:
        tl.store(target, by_shift, mask=inside)
        tl.store(target + step, by_scale, mask=inside)
    if BRANCH:
        tl.store(target + (2 * step if NORM else 0), by_gate, mask=inside)


COMPILED = isinstance(_forward, JITFunction)  # False: Triton's interpreter runs the kernels, for tests on CPUs


def _constants(probability: float, width: int, *, branch: bool, norm: bool) -> dict[str, Any]:
    sizes = {"EPS": NORM_EPS, "BLOCK": triton.next_power_of_2(width)}
    return {"BRANCH": branch, "NORM": norm, **sizes, **dropping(probability)}


def _image_stride(of_image: Tensor | None) -> int:
    return 0 if of_image is None else of_image.stride(0)


def forward(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, weight: Tensor | None, shift: Tensor | None, scale:
    Tensor | None, seed: Tensor | None, probability: float, launch: Launch = FORWARD,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """The sum and its norm, (B, N, C) each. The sum is None if `branch` is, the norm if `weight` is."""
    images, tokens, width = x.shape
    x, branch = x.contiguous(), None if branch is None else branch.contiguous()
    out, y = (None if absent is None else torch.empty_like(x) for absent in (branch, weight))
    kernel = wrap_triton(_forward) if COMPILED else _forward
    kernel[(images * tokens,)](
        x, branch, gate, weight, shift, scale, seed, out, y, tokens, width, *map(_image_stride, (gate, shift,
        scale)), **_constants(probability, width, branch=branch is not None, norm=weight is not None),
        num_warps=launch.warps,
    )  # fmt: skip
    return out, y


def backward(
    grad_out: Tensor | None, grad_y: Tensor | None, x: Tensor | None, branch: Tensor | None, gate: Tensor | None,
    weight: Tensor | None, scale: Tensor | None, seed: Tensor | None, probability: float, launch: Launch | None =
    None,
) -> tuple[Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    """The gradient of x (None without a norm), that of the branch (None without one), and sums (., B, C), float32.

    `x` is the tensor that was normalised. The sums are over an image's tokens. They give the gradients of the shift and
    the scale (with a norm), and of the gate (with a branch), in this order.
    """
    some = grad_y if grad_out is None else grad_out
    assert some is not None
    images, tokens, width = some.shape
    launch = launch or BACKWARD.get(triton.next_power_of_2(width), WIDE_BACKWARD)
    parts = triton.cdiv(tokens, launch.tokens)
    grad_out, grad_y, x, branch = (None if t is None else t.contiguous() for t in (grad_out, grad_y, x, branch))
    grad_x = None if x is None else torch.empty_like(x)
    grad_branch = None if branch is None else torch.empty_like(branch)
    planes = 2 * (weight is not None) + (branch is not None)
    sums = some.new_empty((planes, images, parts, width), dtype=torch.float32)
    kernel = wrap_triton(_backward) if COMPILED else _backward
    kernel[(parts, images)](
        grad_out, grad_y, x, branch, gate, weight, scale, seed, grad_x, grad_branch, sums, tokens, width, parts,
        *map(_image_stride, (gate, scale)), ROWS=launch.tokens, STAGES=launch.stages, **_constants(probability,
        width, branch=branch is not None, norm=weight is not None), num_warps=launch.warps,
    )  # fmt: skip
    return grad_x, grad_branch, sums.sum(2)


@triton_op("jitscale::modulated_norm", mutates_args={})
def modulated_norm(x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """The RMS norm of x (B, N, C) with `weight` (C,), times 1 + scale, plus shift (B, C): (B, N, C) in x's dtype."""
    return cast(Tensor, forward(x, None, None, weight, shift, scale, None, 0.0)[1])


@triton_op("jitscale::modulated_norm_backward", mutates_args={})
def _modulated_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    grad_x, _, sums = backward(None, grad, x, None, None, weight, scale, None, 0.0)
    return cast(Tensor, grad_x), sums


@triton_op("jitscale::add_and_norm", mutates_args={})
def add_and_norm(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    weight: Tensor,
    shift: Tensor,
    scale: Tensor,
    seed: Tensor | None,
    probability: float,
) -> tuple[Tensor, Tensor]:
    """The result of `gated_add`, and its `modulated_norm`: both (B, N, C)."""
    return cast(tuple[Tensor, Tensor], forward(x, branch, gate, weight, shift, scale, seed, probability))


@triton_op("jitscale::add_and_norm_backward", mutates_args={})
def _add_and_norm_backward(
    grad_out: Tensor, grad_y: Tensor, out: Tensor, branch: Tensor, gate: Tensor, weight: Tensor, scale: Tensor,
    seed: Tensor | None, probability: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    found = backward(grad_out, grad_y, out, branch, gate, weight, scale, seed, probability)
    return cast(tuple[Tensor, Tensor, Tensor], found)


@triton_op("jitscale::gated_add", mutates_args={})
def gated_add(x: Tensor, branch: Tensor, gate: Tensor, seed: Tensor | None, probability: float) -> Tensor:
    """x + gate * branch, for x and branch (B, N, C) and gate (B, C).

    With a `seed`, int64 (1,), each element of the branch is dropped with `probability`, and the others are scaled up.
    """
    return cast(Tensor, forward(x, branch, gate, None, None, None, seed, probability)[0])


@triton_op("jitscale::gated_add_backward", mutates_args={})
def _gated_add_backward(
    grad: Tensor, branch: Tensor, gate: Tensor, seed: Tensor | None, probability: float
) -> tuple[Tensor, Tensor]:
    _, grad_branch, sums = backward(grad, None, None, branch, gate, None, None, seed, probability)
    return cast(Tensor, grad_branch), sums


def _of_modulation(sums: Tensor, weight: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of weight, shift and scale from the sums (2, B, C) over tokens."""
    by_shift, by_scale = sums
    of_weight = ((1.0 + scale.float()) * by_scale).sum(0)
    return of_weight.to(weight.dtype), by_shift.to(shift.dtype), (by_scale * weight.float()).to(scale.dtype)


def _keep_norm(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _norm_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    x, weight, shift, scale = ctx.saved_tensors
    grad_x, sums = _modulated_norm_backward(grad.contiguous(), x, weight, scale)
    return grad_x, *_of_modulation(sums, weight, shift, scale)


def _keep_both(ctx: Any, inputs: Any, output: Any) -> None:
    _, branch, gate, weight, shift, scale, seed, ctx.probability = inputs
    ctx.save_for_backward(output[0], branch, gate, weight, shift, scale, seed)


def _both_gradients(ctx: Any, grad_out: Tensor, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    out, branch, gate, weight, shift, scale, seed = ctx.saved_tensors
    grad_x, grad_branch, sums = _add_and_norm_backward(
        grad_out.contiguous(), grad_y.contiguous(), out, branch, gate, weight, scale, seed, ctx.probability
    )
    of_norm = _of_modulation(sums[:2], weight, shift, scale)
    return grad_x, grad_branch, sums[2].to(gate.dtype), *of_norm, None, None


def _keep_add(ctx: Any, inputs: Any, output: Any) -> None:
    _, branch, gate, seed, ctx.probability = inputs
    ctx.save_for_backward(branch, gate, seed)


def _add_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    branch, gate, seed = ctx.saved_tensors
    grad = grad.contiguous()
    grad_branch, by_gate = _gated_add_backward(grad, branch, gate, seed, ctx.probability)
    return grad, grad_branch, by_gate[0].to(gate.dtype), None, None


modulated_norm.register_autograd(_norm_gradients, setup_context=_keep_norm)
add_and_norm.register_autograd(_both_gradients, setup_context=_keep_both)
gated_add.register_autograd(_add_gradients, setup_context=_keep_add)


def _seed(x: Tensor, dropout: float) -> Tensor | None:
    """A seed from the default generator of the device; None without dropout."""
    return torch.randint(2**62, (1,), device=x.device) if dropout > 0 else None


def _add_and_norm(
    x: Tensor, branch: Tensor, gate: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, dropout: float
) -> tuple[Tensor, Tensor]:
    return add_and_norm(x, branch, gate, weight, shift, scale, _seed(x, dropout), dropout)


def _gated_add(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    return gated_add(x, branch, gate, None, 0.0)


KERNELS = ResidualKernels(modulated_norm, _add_and_norm, _gated_add)
