"""Normalised and rotated queries and keys from the product of the qkv layer: Triton kernels.

They compute the same as `layers.RMSNorm` and `layers.rotate`, in float32 and rounded once. Each pass reads and writes
every element once. Forward: reads the product, writes q, k and v. Backward: reads three gradients and the product,
writes the product's gradient.

Shapes: B batch, N tokens, H heads, D head dim. A program handles one token of several images, so that it reads the
token's rotation once (for each image, if images have different tokens). Its tile is H rows of D channels, both rounded
up to a power of two.
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

from jitscale.model.layers import NORM_EPS


class Launch(NamedTuple):
    """Launch parameters of a kernel."""

    images: int  # images for each program, one after the other
    warps: int  # warps of one program
    stages: int = 1  # depth of the software pipeline: images that are loaded ahead


# The fastest of the tested parameters, on an H200, for 64 x 288 tokens, 12 heads of 64 and 16 of 80.
FORWARD = Launch(images=1, warps=4)
BACKWARD = {1024: Launch(images=8, warps=4, stages=3)}  # key: number of elements of a tile
WIDE_BACKWARD = Launch(images=8, warps=8, stages=3)
VECTOR = 16  # bytes that a thread reads at once


@triton.jit
def _exchanged(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Swaps the channels of each pair."""
    first, second = tl.split(tl.reshape(x, (ROWS, COLUMNS // 2, 2)))
    return tl.reshape(tl.join(second, first), (ROWS, COLUMNS))


@triton.jit
def _forward_one(x, weight, cos, sin, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EPS: tl.constexpr):
    x = x.to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, axis=1) / D + EPS)[:, None] * weight
    return x * cos + _exchanged(x, ROWS, COLUMNS) * sin


@triton.jit
def _backward_one(
    g, x, weight, cos, sin, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EPS: tl.constexpr
):
    """The gradient of x, and each row's part of the gradient of the weight."""
    g, x = g.to(tl.float32), x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / D + EPS)[:, None]
    x = x * scale
    g = g * cos + _exchanged(g * sin, ROWS, COLUMNS)  # the transpose of the rotation matrix
    of_weight = g * x
    g = g * weight
    return scale * (g - x * (tl.sum(g * x, axis=1) / D)[:, None]), of_weight


@triton.jit
def _forward(
    qkv,  # (B, N, 3, H, D), contiguous like q, k and v (B, N, H, D)
    q_weight,  # (D,)
    k_weight,
    rope,  # (2, N, D), or (2, B, N, D) if OWN
    q,
    k,
    v,
    batch,
    tokens,
    rope_table,  # strides of the rotation
    rope_image,
    rope_token,
    H: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OWN: tl.constexpr,
    IMAGES: tl.constexpr,
    STAGES: tl.constexpr,
    EPS: tl.constexpr,
):
    token = tl.program_id(0) % tokens
    first = tl.program_id(0) // tokens * IMAGES
    head = tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, COLUMNS)[None]
    inside = head * D + channel
    exists = (head < H) & (channel < D)
    rope += token * rope_token + channel
    if not OWN:
        cos = tl.load(rope, mask=channel < D, other=0.0)
        sin = tl.load(rope + rope_table, mask=channel < D, other=0.0)
    of_q = tl.load(q_weight + channel, mask=channel < D, other=0.0).to(tl.float32)
    of_k = tl.load(k_weight + channel, mask=channel < D, other=0.0).to(tl.float32)
    for index in tl.range(0, IMAGES, num_stages=STAGES):
        image = first + index
        mask = exists & (image < batch)
        if OWN:
            own, turns = rope + image.to(tl.int64) * rope_image, (channel < D) & (image < batch)
            cos = tl.load(own, mask=turns, other=0.0)
            sin = tl.load(own + rope_table, mask=turns, other=0.0)
        row = image.to(tl.int64) * tokens + token
        source = qkv + row * (3 * H * D) + inside
        x_q = tl.load(source, mask=mask, other=0.0)
        x_k = tl.load(source + H * D, mask=mask, other=0.0)
        x_v = tl.load(source + 2 * H * D, mask=mask, other=0.0)
        target = row * (H * D) + inside
        x_q = _forward_one(x_q, of_q, cos, sin, D, ROWS, COLUMNS, EPS)
        x_k = _forward_one(x_k, of_k, cos, sin, D, ROWS, COLUMNS, EPS)
        tl.store(q + target, x_q.to(q.dtype.element_ty), mask=mask)
        tl.store(k + target, x_k.to(k.dtype.element_ty), mask=mask)
        tl.store(v + target, x_v, mask=mask)


@triton.jit
def _backward(
    dq,  # (B, N, H, D), any strides, except that the last one is 1
    dk,
    dv,
    qkv,  # (B, N, 3, H, D), contiguous like its gradient
    q_weight,  # (D,)
    k_weight,
    rope,  # (2, N, D), or (2, B, N, D) if OWN
    dqkv,
    partial,  # (programs, 2, D), float32: gradients of the two weights
    batch,
    tokens,
    rope_table,  # strides
    rope_image,
    rope_token,
    dq_image,  # strides in units of UNIT elements, so that the compiler knows that they are multiples of UNIT
    dq_token,
    dq_head,
    dk_image,
    dk_token,
    dk_head,
    dv_image,
    dv_token,
    dv_head,
    UNIT: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OWN: tl.constexpr,
    IMAGES: tl.constexpr,
    STAGES: tl.constexpr,
    EPS: tl.constexpr,
):
    token = tl.program_id(0) % tokens
    first = tl.program_id(0) // tokens * IMAGES
    head = tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, COLUMNS)[None]
    inside = head * D + channel
    exists = (head < H) & (channel < D)
    rope += token * rope_token + channel
    if not OWN:
        cos = tl.load(rope, mask=channel < D, other=0.0)
        sin = tl.load(rope + rope_table, mask=channel < D, other=0.0)
    of_q = tl.load(q_weight + channel, mask=channel < D, other=0.0).to(tl.float32)
    of_k = tl.load(k_weight + channel, mask=channel < D, other=0.0).to(tl.float32)
    wide_token, wide_head = token.to(tl.int64), head.to(tl.int64)
    dq += wide_token * dq_token * UNIT + wide_head * dq_head * UNIT + channel
    dk += wide_token * dk_token * UNIT + wide_head * dk_head * UNIT + channel
    dv += wide_token * dv_token * UNIT + wide_head * dv_head * UNIT + channel
    sum_q = tl.zeros((ROWS, COLUMNS), tl.float32)
    sum_k = tl.zeros((ROWS, COLUMNS), tl.float32)
    for index in tl.range(0, IMAGES, num_stages=STAGES):
        image = first + index
        mask = exists & (image < batch)
        if OWN:
            own, turns = rope + image.to(tl.int64) * rope_image, (channel < D) & (image < batch)
            cos = tl.load(own, mask=turns, other=0.0)
            sin = tl.load(own + rope_table, mask=turns, other=0.0)
        wide = image.to(tl.int64)
        place = (wide * tokens + token) * (3 * H * D) + inside
        x_q = tl.load(qkv + place, mask=mask, other=0.0)
        x_k = tl.load(qkv + place + H * D, mask=mask, other=0.0)
        g_q = tl.load(dq + wide * dq_image * UNIT, mask=mask, other=0.0)
        g_k = tl.load(dk + wide * dk_image * UNIT, mask=mask, other=0.0)
        g_v = tl.load(dv + wide * dv_image * UNIT, mask=mask, other=0.0)
        g_q, share = _backward_one(g_q, x_q, of_q, cos, sin, D, ROWS, COLUMNS, EPS)
        sum_q += share
        g_k, share = _backward_one(g_k, x_k, of_k, cos, sin, D, ROWS, COLUMNS, EPS)
        sum_k += share
        tl.store(dqkv + place, g_q.to(dqkv.dtype.element_ty), mask=mask)
        tl.store(dqkv + place + H * D, g_k.to(dqkv.dtype.element_ty), mask=mask)
        tl.store(dqkv + place + 2 * H * D, g_v, mask=mask)
    sums = partial + tl.program_id(0).to(tl.int64) * (2 * D) + tl.arange(0, COLUMNS)
    tl.store(sums, tl.sum(sum_q, axis=0), mask=tl.arange(0, COLUMNS) < D)
    tl.store(sums + D, tl.sum(sum_k, axis=0), mask=tl.arange(0, COLUMNS) < D)


COMPILED = isinstance(_forward, JITFunction)  # False: Triton's interpreter runs the kernels, for tests on CPUs


def _shape(qkv: Tensor, rope: Tensor, launch: Launch) -> tuple[int, int, int, int, int, dict[str, Any]]:
    """B, N, H, D, the number of programs, and the kernels' constants."""
    batch, tokens, width = qkv.shape
    head_dim = rope.shape[-1]
    heads = width // (3 * head_dim)
    rows, columns = (triton.next_power_of_2(size) for size in (heads, head_dim))
    constants = {"H": heads, "D": head_dim, "ROWS": rows, "COLUMNS": columns, "EPS": NORM_EPS}
    constants |= {"OWN": rope.dim() == 4, "IMAGES": launch.images, "STAGES": launch.stages}
    return batch, tokens, heads, head_dim, tokens * -(-batch // launch.images), constants


def forward(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor, launch: Launch = FORWARD
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, 3 H D), (D,), (D,) -> q, k and v, (B, N, H, D) each; `rope`: see `layers.rotate`."""
    batch, tokens, heads, head_dim, programs, constants = _shape(qkv, rope, launch)
    qkv, rope = qkv.contiguous(), _rows(rope)
    q, k, v = (qkv.new_empty((batch, tokens, heads, head_dim)) for _ in range(3))
    kernel = wrap_triton(_forward) if COMPILED else _forward
    kernel[(programs,)](
        qkv,
        q_weight.contiguous(),
        k_weight.contiguous(),
        rope,
        q,
        k,
        v,
        batch,
        tokens,
        *_strides(rope),
        **constants,
        num_warps=launch.warps,
    )
    return q, k, v


def backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: Tensor,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of qkv and the two weights from those of q, k and v, which may be strided."""
    if launch is None:
        head_dim = rope.shape[-1]
        tile = triton.next_power_of_2(qkv.shape[-1] // (3 * head_dim)) * triton.next_power_of_2(head_dim)
        launch = BACKWARD.get(tile, WIDE_BACKWARD)
    batch, tokens, _, head_dim, programs, constants = _shape(qkv, rope, launch)
    qkv, rope = qkv.contiguous(), _rows(rope)
    dq, dk, dv = (_rows(gradient) for gradient in (dq, dk, dv))
    strides = [stride for gradient in (dq, dk, dv) for stride in gradient.stride()[:3]]
    unit = VECTOR // qkv.element_size()
    if any(stride % unit for stride in strides):
        unit = 1
    dqkv = torch.empty_like(qkv)
    partial = qkv.new_empty((programs, 2, head_dim), dtype=torch.float32)
    kernel = wrap_triton(_backward) if COMPILED else _backward
    kernel[(programs,)](
        dq,
        dk,
        dv,
        qkv,
        q_weight.contiguous(),
        k_weight.contiguous(),
        rope,
        dqkv,
        partial,
        batch,
        tokens,
        *_strides(rope),
        *(stride // unit for stride in strides),
        unit,
        **constants,
        num_warps=launch.warps,
    )
    of_weights = partial.sum(0)
    return dqkv, of_weights[0].to(q_weight.dtype, copy=True), of_weights[1].to(k_weight.dtype, copy=True)


def _strides(rope: Tensor) -> tuple[int, int, int]:
    """Strides of a rotation: between the two tables, between images (0 if they share it), between tokens."""
    table, *image, token, _ = rope.stride()
    return table, image[0] if image else 0, token


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@triton_op("jitscale::split_heads", mutates_args=())
def split_heads(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q and k normalised with their weights (D,) and rotated by `rope`, and v, from (B, N, 3 H D).

    `rope`: see `layers.rotate`. The results are contiguous, (B, N, H, D) each, in the dtype of `qkv`. They are
    differentiable, except with respect to `rope`.
    """
    return forward(qkv, q_weight, k_weight, rope)


@triton_op("jitscale::split_heads_backward", mutates_args=())
def split_heads_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return backward(dq, dk, dv, qkv, q_weight, k_weight, rope)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return *split_heads_backward(dq, dk, dv, *ctx.saved_tensors), None


split_heads.register_autograd(_differentiate, setup_context=_keep)
