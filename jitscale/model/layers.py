"""The parts of the network: norms, rotary positions, embedders, attention and feed-forward layers.

Shapes: B batch, N tokens, H heads, D head dim, C hidden size, A channels of an image, P patch size, G tokens per side
of the image.

Parameters have the names of the authors' checkpoints, so that their files load unchanged.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jitscale.model.attention import Kernel, sdpa

NORM_EPS = 1e-6
ROPE_THETA = 10_000.0
TIMESTEP_FREQUENCIES = 256
Product = Callable[[Tensor, Tensor, Tensor], Tensor]  # see torch.nn.functional.linear
SplitHeads = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]  # see fused.heads.split_heads
Gated = Callable[[Tensor, float], Tensor]  # see fused.gated.gated


class ResidualKernels(NamedTuple):
    """Operators that add the branches of a block to its stream x (B, N, C). Shifts, scales and gates are (B, C)."""

    modulated_norm: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (x, norm weight (C,), shift, scale)
    # (x, branch (B, N, C), gate, norm weight, shift, scale, dropout of the branch) -> the sum and its modulated norm.
    add_and_norm: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    gated_add: Callable[[Tensor, Tensor, Tensor], Tensor]  # (x, branch, gate)


ALIGNMENT = 64  # the inner width of feed-forward layers is padded to a multiple of this


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last axis, computed in float32, returned in the input's dtype."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """`RMSNorm` of x (..., C) with `weight` (C,)."""
    x32 = x.float()
    x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + NORM_EPS)
    return (x32 * weight.float()).to(x.dtype)


def sincos_position_table(hidden_size: int, grid: int, span: int | None = None) -> Tensor:
    """Fixed 2-D sine-cosine embedding, (G * G, C) float32; the column (w) is in the first half.

    The positions of the G tokens of an axis span `span` (default: G): token i lies at i span / G.
    """
    quarter = hidden_size // 4
    frequency = 1.0 / ROPE_THETA ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    angle = _positions(grid, span)[:, None] * frequency  # (G, C/4)
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # (G, C/2)
    column = axis[None].expand(grid, grid, -1)
    row = axis[:, None].expand(grid, grid, -1)
    return torch.cat([column, row], dim=2).reshape(grid * grid, hidden_size).float()


def _positions(grid: int, span: int | None) -> Tensor:
    positions = torch.arange(grid, dtype=torch.float64)
    return positions if span is None else positions * (span / grid)


def rope_table(head_dim: int, grid: int, prefix: int, span: int | None = None) -> Tensor:
    """Cosine and sine of the 2-D axial rotation: (2, prefix + G * G, D) float32.

    The first half of the head dim rotates with the row, the second with the column. Neighbouring channels form a pair;
    the sine of the first one is negative, as `rotate` needs it. The `prefix` in-context tokens have no position in the
    image and are not rotated. `span`: see `sincos_position_table`.
    """
    frequency = 1.0 / ROPE_THETA ** (torch.arange(0, head_dim // 2, 2, dtype=torch.float32) / (head_dim // 2))
    axis = (_positions(grid, span).float()[:, None] * frequency).repeat_interleave(2, dim=1)  # (G, D/2)
    row = axis[:, None].expand(grid, grid, -1)
    column = axis[None].expand(grid, grid, -1)
    angle = torch.cat([row, column], dim=2).reshape(grid * grid, head_dim)
    angle = torch.cat([torch.zeros(prefix, head_dim), angle])
    sign = torch.tensor([-1.0, 1.0]).repeat(head_dim // 2)
    return torch.stack([angle.cos(), sign * angle.sin()])


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Apply rotary positions in float32 to `x` (B, N, H, D); keeps the dtype of `x`.

    `rope` is (2, N, D) for all images, or (2, B, N, D) if images have different tokens.
    """
    cos, sin = rope.unsqueeze(-2)  # (N, 1, D) or (B, N, 1, D) each
    x32 = x.float()
    exchanged = x32.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)  # swaps the channels of each pair
    return (x32 * cos + exchanged * sin).to(x.dtype)


class PatchProduct(nn.Conv2d):
    """A convolution with patches that do not overlap, computed as a matrix product: several times faster on GPUs.

    Its weight has the shape of a convolution's, as in the authors' checkpoints.
    """

    def forward(self, patches: Tensor) -> Tensor:
        """(B, N, C_in * P * P) -> (B, N, C_out)"""
        return F.linear(patches, self.weight.flatten(1), self.bias)


class BottleneckPatchEmbed(nn.Module):
    """Patches through a low-rank bottleneck (arXiv 2511.13720, section 4.3): P x P x A -> bottleneck -> C."""

    def __init__(self, in_channels: int, patch_size: int, bottleneck_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj1 = PatchProduct(in_channels, bottleneck_dim, patch_size, bias=False)
        self.proj2 = PatchProduct(bottleneck_dim, hidden_size, 1)

    def forward(self, image: Tensor) -> Tensor:
        """(B, A, G P, G P) -> (B, N, C)"""
        patch = self.patch_size
        patches = image.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # (B, A, G, P, G, P)
        return self.proj2(self.proj1(patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)))


class TimestepEmbedder(nn.Module):
    """Sinusoid of t, then a two-layer MLP."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        first, second = nn.Linear(TIMESTEP_FREQUENCIES, hidden_size), nn.Linear(hidden_size, hidden_size)
        self.mlp = nn.Sequential(first, nn.SiLU(), second)

    def forward(self, t: Tensor) -> Tensor:
        """(B,) -> (B, C)"""
        weight: Tensor = self.mlp[0].weight  # type: ignore[assignment]
        half = TIMESTEP_FREQUENCIES // 2
        frequency = torch.exp(-math.log(10_000.0) / half * torch.arange(half, dtype=torch.float32, device=t.device))
        angle = t.float()[:, None] * frequency
        sinusoid = torch.cat([angle.cos(), angle.sin()], dim=1)
        return self.mlp(sinusoid.to(weight.dtype))


class LabelEmbedder(nn.Module):
    """One vector for each class; an extra last one means "no class"."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, labels: Tensor) -> Tensor:
        """(B,) -> (B, C)"""
        return self.embedding_table(labels)


def split_heads(qkv: Tensor, q_norm: RMSNorm, k_norm: RMSNorm, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q and k, normalised and rotated, and v, (B, N, H, D) each, from (B, N, 3 H D); `rope`: see `rotate`."""
    q, k, v = qkv.unflatten(-1, (3, -1, rope.shape[-1])).unbind(2)
    return rotate(q_norm(q), rope), rotate(k_norm(k), rope), v


class Attention(nn.Module):
    """Multi-head attention with normalised, rotated queries and keys."""

    def __init__(self, hidden_size: int, num_heads: int, attn_dropout: float, proj_dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_norm = RMSNorm(hidden_size // num_heads)
        self.k_norm = RMSNorm(hidden_size // num_heads)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.attn_dropout = attn_dropout
        self.kernel: Kernel = sdpa  # set by model/execution.py
        self.product: Product | None = None
        self.split_heads: SplitHeads | None = None
        self.proj_drop = nn.Dropout(proj_dropout)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C), before `proj_drop`; `rope`: see `rotate`."""
        qkv = multiply(self.product, x, self.qkv)
        if self.split_heads is None:
            q, k, v = split_heads(qkv, self.q_norm, self.k_norm, rope)
        else:
            q, k, v = self.split_heads(qkv, self.q_norm.weight, self.k_norm.weight, rope)
        out = self.kernel(q, k, v, self.attn_dropout if self.training else 0.0)
        return multiply(self.product, out.flatten(2), self.proj)


def gated(h: Tensor) -> Tensor:
    """silu(gate) * value: (..., 2 I) -> (..., I)"""
    gate, value = h.chunk(2, dim=-1)
    return F.silu(gate) * value


class SwiGLU(nn.Module):
    """Gated feed-forward layer (Shazeer 2020) of inner width int(4 C * 2/3), gate and value in one matrix.

    The inner width of most sizes is not a multiple of 8, and bf16 matrix products of such widths are slow on GPUs. With
    `aligned`, weights are padded with zeros to a multiple of ALIGNMENT. This is exact, because silu(0) * 0 = 0 and the
    gradients of the padding are dropped. The weights are padded in every pass, so that the shapes of parameters, and of
    checkpoints, averages, moments and Muon's matrices, do not change. With bf16 arithmetic the padding is part of the
    cast.
    """

    def __init__(self, hidden_size: int, dropout: float) -> None:
        super().__init__()
        inner = swiglu_width(hidden_size)
        self.w12 = nn.Linear(hidden_size, 2 * inner)
        self.w3 = nn.Linear(inner, hidden_size)
        self.drop = nn.Dropout(dropout)
        self.padding = -inner % ALIGNMENT
        self.aligned = False  # set by model/execution.py
        self.product: Product | None = None
        self.gated: Gated | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)"""
        if self.aligned and self.padding:
            return self._padded(x)
        return multiply(self.product, self._gated(multiply(self.product, x, self.w12)), self.w3)

    def _padded(self, x: Tensor) -> Tensor:
        w12, b12, w3 = (in_arithmetic_of(x, p) for p in (self.w12.weight, self.w12.bias, self.w3.weight))
        w12 = F.pad(w12.unflatten(0, (2, -1)), (0, 0, 0, self.padding)).flatten(0, 1)  # pads gate and value
        b12 = F.pad(b12.unflatten(0, (2, -1)), (0, self.padding)).flatten()
        product = self.product or F.linear
        return product(self._gated(product(x, w12, b12)), F.pad(w3, (0, self.padding)), self.w3.bias)

    def _gated(self, h: Tensor) -> Tensor:
        if self.gated is None:
            return self.drop(gated(h))
        return self.gated(h, self.drop.p if self.training else 0.0)


def multiply(product: Product | None, x: Tensor, layer: nn.Linear) -> Tensor:
    """`layer` of `x`, computed with `product`; None: with torch's."""
    return layer(x) if product is None else product(x, layer.weight, layer.bias)


def in_arithmetic_of(x: Tensor, parameter: Tensor) -> Tensor:
    """`parameter` in the dtype that autocast would use, so that autocast does not cast the padded copy again."""
    device = x.device.type
    return parameter.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else parameter


def swiglu_width(hidden_size: int) -> int:
    """Inner width of the feed-forward layer."""
    return int(4 * hidden_size * 2 / 3)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive layer norm (Peebles and Xie 2023): (B, N, C) with (B, C) each."""
    return x * (1 + scale[:, None]) + shift[:, None]
