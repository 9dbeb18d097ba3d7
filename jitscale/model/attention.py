"""Attention behind one signature: softmax(q k^T / sqrt(D)) v for every head, not causal.

A kernel takes q, k, v (B, N, H, D), strided views if the last stride is 1, and the probability of dropping an attention
weight (0 outside training); it returns (B, N, H, D) in the dtype of v.

Shapes: B batch, N tokens, H heads, D head dim.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from jitscale.errors import ConfigError, first_line
from jitscale.versions import version_of

Kernel = Callable[[Tensor, Tensor, Tensor, float], Tensor]

FLASH_4_PADDED = {104: 128}  # head dims whose backward pass does not compile, and the next that does
PROBE_TOLERANCE = 0.05  # of the largest element, in bf16


def sdpa(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """PyTorch's fused kernel for the device: cuDNN's or FlashAttention-2 on GPUs."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, N, D)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2)


def unfused(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """The authors' way, for comparison: logits in float32, materialised (B, H, N, N)."""
    with torch.autocast(q.device.type, enabled=False):
        logits = torch.einsum("bnhd,bmhd->bhnm", q.float(), k.float()) * q.shape[-1] ** -0.5
    weights = F.dropout(logits.softmax(-1), dropout)
    return torch.einsum("bhnm,bmhd->bnhd", weights.to(v.dtype), v)


def flash_attn(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """FlashAttention-2, the package flash-attn: bf16 on GPUs, with dropout."""
    # An extra; flash-attn-4 alone makes `import flash_attn` succeed.
    from flash_attn import flash_attn_func  # noqa: PLC0415

    return flash_attn_func(q, k, v, dropout_p=dropout)


def flash_attn_4(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """FlashAttention-4, the package flash-attn-4: bf16 on Hopper and newer, without dropout."""
    if dropout > 0:
        raise ValueError("has no dropout")
    head_dim = q.shape[-1]
    scale = head_dim**-0.5
    padding = FLASH_4_PADDED.get(head_dim, head_dim) - head_dim
    if padding:  # exact: zeros add nothing to a product, and the scale stays that of D
        q, k, v = (F.pad(x, (0, padding)) for x in (q, k, v))
    out, _ = (_operators.get("forward") or _register())(q, k, v, scale)
    return out[..., :head_dim] if padding else out


_operators: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {}


def _register() -> Callable[..., tuple[Tensor, Tensor]]:
    """Make an operator of torch, inside which torch.compile does not look, of private functions of flash-attn-4.

    Before anything is compiled: `choose_kernel` calls the kernel.
    """
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd  # noqa: PLC0415

    @torch.library.custom_op("jitscale::flash_attn_4", mutates_args=())
    def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, *_ = _flash_attn_fwd(q, k, v, softmax_scale=scale, return_lse=True)
        return out, lse

    @forward.register_fake
    def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        batch, tokens, heads, _ = q.shape
        return q.new_empty(v.shape), q.new_empty((batch, heads, tokens), dtype=torch.float32)

    @torch.library.custom_op("jitscale::flash_attn_4_backward", mutates_args=())
    def backward(
        q: Tensor, k: Tensor, v: Tensor, out: Tensor, gradient: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv, *_ = _flash_attn_bwd(q, k, v, out, gradient, lse, scale)
        return dq, dk, dv

    @backward.register_fake
    def _(
        q: Tensor, k: Tensor, v: Tensor, out: Tensor, gradient: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    def keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*inputs[:3], *output)
        ctx.scale = inputs[3]

    def differentiate(ctx, gradient, _):  # type: ignore[no-untyped-def]
        q, k, v, out, lse = ctx.saved_tensors
        return *backward(q, k, v, out, gradient.contiguous(), lse, ctx.scale), None

    forward.register_autograd(differentiate, setup_context=keep)
    _operators["forward"] = forward
    return forward


KERNELS: dict[str, Kernel] = {
    "flash-attn-4": flash_attn_4,
    "flash-attn": flash_attn,
    "sdpa": sdpa,
    "reference": unfused,
}
FASTEST_FIRST = ("flash-attn-4", "flash-attn", "sdpa")


@dataclass(frozen=True)
class ChosenKernel:
    """A kernel that was tried at the shape it is for."""

    name: str  # of `KERNELS`
    version: str  # of the package that it comes from
    reason: str  # why it and not another


def choose_kernel(
    asked: str,
    *,
    tokens: Sequence[int],
    heads: int,
    head_dim: int,
    dropouts: Sequence[float],
    dtype: torch.dtype,
    device: torch.device,
) -> ChosenKernel:
    """The kernel `asked`, or for "auto" the first of `FASTEST_FIRST` that passes a probe at the real shape.

    The probe runs forward and backward at every number of tokens and every dropout that the network has, and compares
    with `unfused` where nothing is dropped. Raises a ConfigError that says why, if the kernel that was asked for does
    not pass.
    """
    if asked == "auto" and (device.type != "cuda" or dtype == torch.float32):
        return ChosenKernel("sdpa", _version("sdpa"), f"{device.type}, {str(dtype).removeprefix('torch.')}")
    failures: list[str] = []  # which kernel does not work, and why
    for name in FASTEST_FIRST if asked == "auto" else (asked,):
        try:
            for length, dropout in sorted(set(product(tokens, dropouts))):
                _probe(KERNELS[name], (1, length, heads, head_dim), dropout, dtype, device)
        except Exception as error:  # compilers of kernels raise what they like; it is said
            failures.append(f"{name}: {first_line(error)}")
        else:
            reason = "asked for" if asked != "auto" else "; ".join(failures) or "the first that was tried"
            return ChosenKernel(name, _version(name), reason)
    if asked == "auto":
        raise ConfigError(f"engine.attention=auto: no kernel works here ({'; '.join(failures)})")
    why = failures[0].removeprefix(f"{asked}: ")
    case = f"head dim {head_dim}, {dtype}, dropout {max(dropouts)}, {device}"
    raise ConfigError(f"engine.attention={asked} does not work here ({why}); {case}; choose auto")


def _probe(
    kernel: Kernel, shape: tuple[int, int, int, int], dropout: float, dtype: torch.dtype, device: torch.device
) -> None:
    generator = torch.Generator(device).manual_seed(0)
    random = torch.randn(4, *shape, generator=generator, device=device, dtype=dtype)
    # Strided as the network has them: q, k and v lie in one tensor.
    q, k, v, gradient = (x.requires_grad_() for x in random.permute(1, 2, 0, 3, 4).contiguous().unbind(2))
    with torch.enable_grad():
        out = kernel(q, k, v, dropout)
        found = (out, *torch.autograd.grad(out, (q, k, v), gradient.detach()))
        if dropout == 0:
            expected_out = unfused(q, k, v, 0.0)
            expected = (expected_out, *torch.autograd.grad(expected_out, (q, k, v), gradient.detach()))
            for name, a, b in zip(("output", "gradient of q", "of k", "of v"), found, expected, strict=True):
                off = float((a - b).detach().float().abs().max() / b.detach().float().abs().max())
                if not off < PROBE_TOLERANCE:
                    raise ValueError(f"{name} is off by {off:.2g} of the largest element")
    if out.shape != shape or out.dtype != dtype:
        raise ValueError(f"returned {tuple(out.shape)} {out.dtype} for {shape} {dtype}")


def _version(name: str) -> str:
    if name.startswith("flash-attn"):
        return f"{name} {version_of(name) or 'of unknown version'}"
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    return f"torch {torch.__version__}" + (f", cuDNN {cudnn}" if cudnn else "")
