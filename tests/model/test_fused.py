"""The fused kernels against float64: values, gradients, strides, dropout. Triton's interpreter runs them on a CPU.

Skipped without triton, which no CPU needs: it comes with torch's builds for GPUs.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from torch import Tensor

from jitscale.model import layers

pytest.importorskip("triton")
from jitscale.model.fused import gated, heads  # noqa: E402


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def reference_split(qkv, q_weight, k_weight, rope):
    D = rope.shape[-1]
    q, k, v = qkv.double().unflatten(-1, (3, -1, D)).unbind(2)
    out = []
    for x, w in ((q, q_weight), (k, k_weight)):
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + layers.NORM_EPS) * w.double()
        cos, sin = rope.double()[:, :, None]
        out.append(x * cos + x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) * sin)
    return *out, v


@pytest.mark.parametrize("D", [64, 80, 104])
@pytest.mark.parametrize("strided", [False, True])
def test_split(D, strided):
    B, N, H = 3, 12, 3
    qkv = random(B, N, 3 * H * D)
    wq, wk = 1 + 0.3 * random(D, seed=1), 1 + 0.3 * random(D, seed=2)
    rope = layers.rope_table(D, 3, 5)[:, 2:]
    g = [
        random(B, H, N, D, seed=3 + i).transpose(1, 2) if strided else random(B, N, H, D, seed=3 + i) for i in range(3)
    ]
    leaves = [x.clone().requires_grad_() for x in (qkv, wq, wk)]
    found = heads.split_heads(*leaves, rope)
    gf = torch.autograd.grad(found, leaves, g)
    leaves64 = [x.double().requires_grad_() for x in (qkv, wq, wk)]
    exp = reference_split(*leaves64, rope)
    ge = torch.autograd.grad(exp, leaves64, [x.double() for x in g])
    for a, b in zip((*found, *gf), (*exp, *ge)):
        print((a.double() - b).abs().max().item() / b.abs().max().item())
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-6 * float(b.abs().max()))


@pytest.mark.parametrize("I", [64, 341, 600])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_gated(I, p):
    h = random(3, 7, 2 * I).requires_grad_()
    torch.manual_seed(0)
    y = gated.gated(h, p)
    g = random(3, 7, I, seed=1)
    (dh,) = torch.autograd.grad(y, h, g)
    h64 = h.detach().double().requires_grad_()
    a, b = h64.chunk(2, -1)
    e = torch.nn.functional.silu(a) * b
    if p:
        m = y != 0
        print(m.double().mean())
        e = e * m / (1 - round(p * 65536) / 65536)
    (de,) = torch.autograd.grad(e, h64, g.double())
    torch.testing.assert_close(y.double(), e, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dh.double(), de, rtol=1e-5, atol=1e-6)
