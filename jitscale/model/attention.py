"""Attention behind one signature: softmax(q k^T / sqrt(D)) v for every head, not causal.

A kernel takes q, k, v (B, N, H, D) and the probability of dropping an attention weight (0 outside training). q, k and v
may be strided views if their last stride is 1. The kernel returns (B, N, H, D) in the dtype of v.

Shapes: B batch, N tokens, H heads, D head dim.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from jitscale.errors import ConfigError, first_line
from jitscale.versions import version_of

Kernel = Callable[[Tensor, Tensor, Tensor, float], Tensor]

FLASH_4_PADDED = {104: 128}  # head dims without a backward pass that compiles: the padded size that is used instead
CUDNN_FROM = 91500  # cuDNN 9.15: older versions are wrong at lengths that are not a multiple of 128
PROBE_TOLERANCE = 0.05  # largest error, relative to the largest element, in bf16
# Largest error of the share of dropped weights, besides five standard errors: FlashAttention rounds it to 1/256.
SHARE_TOLERANCE = 0.01
PROBE_ELEMENTS = 2**25  # logits that the probe's reference holds at a time


def sdpa(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """PyTorch's attention; PyTorch chooses the kernel by device, dtype and shape."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, N, D)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2)


def sdpa_cudnn(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """PyTorch's attention with cuDNN: bf16 on GPUs, with dropout. Raises a RuntimeError if it is not available."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa(q, k, v, dropout)


def sdpa_flash(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """PyTorch's own FlashAttention-2: bf16 on GPUs, with dropout. Raises a RuntimeError if it is not available."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return sdpa(q, k, v, dropout)


def unfused(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """The authors' code, as a reference: float32 logits (B, H, N, N) are kept in memory."""
    return _weighted(F.dropout(_weights(q, k), dropout), v)


def _weights(q: Tensor, k: Tensor) -> Tensor:
    """(B, N, H, D) each -> (B, H, N, N) float32"""
    with torch.autocast(q.device.type, enabled=False):
        logits = torch.einsum("bnhd,bmhd->bhnm", q.float(), k.float()) * q.shape[-1] ** -0.5
    return logits.softmax(-1)


def _weighted(weights: Tensor, v: Tensor) -> Tensor:
    """(B, H, N, N), (B, N, H, D) -> (B, N, H, D)"""
    return torch.einsum("bhnm,bmhd->bnhd", weights.to(v.dtype), v)


def flash_attn(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """FlashAttention-2, the package flash-attn: bf16 on GPUs, with dropout."""
    # flash-attn is an extra. `import flash_attn` also succeeds if only flash-attn-4 is installed.
    from flash_attn import flash_attn_func  # noqa: PLC0415

    return flash_attn_func(q, k, v, dropout_p=dropout)


def flash_attn_4(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """FlashAttention-4, the package flash-attn-4: bf16 on Hopper and newer, without dropout."""
    if dropout > 0:
        raise ValueError("has no dropout")
    head_dim = q.shape[-1]
    scale = head_dim**-0.5
    padding = FLASH_4_PADDED.get(head_dim, head_dim) - head_dim
    if padding:  # exact, because zeros add nothing to a product and `scale` uses the unpadded D
        q, k, v = (F.pad(x, (0, padding)) for x in (q, k, v))
    out, _ = (_operators.get("forward") or _register())(q, k, v, scale)
    return out[..., :head_dim] if padding else out


_operators: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {}


def _register() -> Callable[..., tuple[Tensor, Tensor]]:
    """Wrap private functions of flash-attn-4 in a torch operator, which torch.compile does not trace into.

    `choose_kernel` calls the kernel before anything is compiled, so the operator exists then.
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
    "sdpa-cudnn": sdpa_cudnn,
    "sdpa-flash": sdpa_flash,
    "sdpa": sdpa,
    "reference": unfused,
}
# The packages come first, because a user who installs one wants it. cuDNN comes before FlashAttention-2: on an H200 it
# takes 0.64 to 0.97 of the time, forward and backward, at JiT-L, H and G, with and without dropout. At JiT-B, whose
# kernels are small, it takes 1.15 of the time without dropout, and the same time with dropout. None of 2,944 passes of
# cuDNN had a gradient that was not finite (docs/performance.md, Attention).
FASTEST_FIRST = ("flash-attn-4", "flash-attn", "sdpa-cudnn", "sdpa-flash", "sdpa")


@dataclass(frozen=True)
class ChosenKernel:
    """A kernel that passed a probe at the real shape."""

    name: str  # in `KERNELS`
    version: str  # version of its package
    reason: str  # why it was chosen


def choose_kernel(
    asked: str,
    *,
    tokens: Sequence[int],
    heads: int,
    head_dim: int,
    dropouts: Sequence[float],
    dtype: torch.dtype,
    device: torch.device,
    batch: int = 1,
    backward: bool = True,
    strided_values: bool = True,
) -> ChosenKernel:
    """The kernel `asked`, or for "auto" the first of `FASTEST_FIRST` that passes a probe at the real shape.

    The probe compares the output and the gradients (without `backward`: only the output) with the authors' code, at
    every number of tokens and every dropout of the network, in a batch of `batch`. With `strided_values`, v is a view
    of the product of the qkv layer; otherwise q, k and v are contiguous. Raises a ConfigError with the reason if the
    requested kernel does not pass, or for "auto" if none passes.
    """
    if asked == "auto" and (device.type != "cuda" or dtype == torch.float32):
        return ChosenKernel("sdpa", _version("sdpa"), f"{device.type}, {str(dtype).removeprefix('torch.')}")
    failures: list[str] = []  # kernels that do not work, with the reason
    for name in FASTEST_FIRST if asked == "auto" else (asked,):
        try:
            if name == "sdpa-cudnn":
                _check_cudnn()
            for length, dropout in sorted(set(product(tokens, dropouts))):
                shape = (batch, length, heads, head_dim)
                _probe(KERNELS[name], shape, dropout, dtype, device, backward=backward, strided_values=strided_values)
        except Exception as error:  # compilers of kernels may raise any type; the reason is logged or raised
            failures.append(f"{name}: {first_line(error)}")
        else:
            reason = "requested" if asked != "auto" else "; ".join(failures) or "first choice"
            return ChosenKernel(name, _version(name), reason)
    if asked == "auto":
        raise ConfigError(f"engine.attention=auto: no kernel works here ({'; '.join(failures)})")
    why = failures[0].removeprefix(f"{asked}: ")
    case = f"head dim {head_dim}, {dtype}, dropout {max(dropouts)}, {device}"
    raise ConfigError(f"engine.attention={asked} does not work here ({why}); {case}; choose auto")


def _check_cudnn() -> None:
    version = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    if version is None:
        raise RuntimeError("there is no cuDNN")
    if version < CUDNN_FROM:
        raise RuntimeError(f"cuDNN {version} is older than {CUDNN_FROM}, and wrong at some lengths")


def _probe(
    kernel: Kernel,
    shape: tuple[int, int, int, int],
    dropout: float,
    dtype: torch.dtype,
    device: torch.device,
    *,
    backward: bool = True,
    strided_values: bool = True,
) -> None:
    """Compare `kernel` with `unfused` at `shape` (B, N, H, D); restores torch's random state.

    Raises a ValueError if the output or a gradient is wrong or not finite, or if dropout is wrong. Errors of the kernel
    pass through.
    """
    generator = _default_generator(device)
    before = generator.get_state()
    try:
        generator.manual_seed(0)
        q, k, gradient = torch.randn(3, *shape, device=device, dtype=dtype).unbind(0)
        v = torch.randn(_of_product(shape, strided_values), device=device, dtype=dtype)[:, :, -1]
        with torch.set_grad_enabled(backward):
            q, k, v = (x.detach().requires_grad_(backward) for x in (q, k, v))
            start = generator.get_state()
            out = kernel(q, k, v, dropout)
            if out.shape != shape or out.dtype != dtype:
                raise ValueError(f"returned {tuple(out.shape)} {out.dtype} for {shape} {dtype}")
            gradients = torch.autograd.grad(out, (q, k, v), gradient) if backward else ()
            kept = None
            if dropout > 0:
                if torch.equal(kernel(q, k, v, dropout), out):
                    raise ValueError("dropout does not differ between calls")
                kept = _kept(kernel, q, k, v, dropout, start)
        _compare((out.detach(), *gradients), (q, k, v), gradient, kept, dropout)
    finally:
        generator.set_state(before)


def _of_product(shape: Sequence[int], strided: bool) -> tuple[int, ...]:
    """The shape of a tensor whose last slice along axis 2 is v (B, N, H, D); if `strided`, q and k come before it."""
    batch, tokens, *heads = shape
    return (batch, tokens, 3 if strided else 1, *heads)


def _kept(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, dropout: float, state: Tensor) -> Tensor:
    """The attention weights that `kernel` does not drop if torch's random state is `state`: (B, H, N, N) bool.

    If the values are columns of the identity, the output shows a part of the weights. Only the random state determines
    which weights are dropped, so the same ones are dropped with the values `v`, whose layout the columns have. Raises a
    ValueError if the share of dropped weights is not `dropout`, or if the first and the last head drop the same ones.
    """
    generator, (batch, tokens, heads, head_dim) = _default_generator(v.device), v.shape
    parts = []
    for part in torch.eye(tokens, device=v.device, dtype=v.dtype).split(head_dim, dim=1):
        width = part.shape[1]  # head_dim, or less for the last columns
        columns = v.new_zeros(_of_product(v.shape, not v.is_contiguous()))[:, :, -1]
        columns[..., :width] = part[:, None]
        generator.set_state(state)
        shown = kernel(q, k, columns.requires_grad_(v.requires_grad), dropout).detach()
        parts.append(shown[..., :width] != 0)
    kept = torch.cat(parts, dim=-1).transpose(1, 2)
    share = 1 - float(kept.sum()) / kept.numel()
    allowed = SHARE_TOLERANCE + 5 * (dropout * (1 - dropout) / kept.numel()) ** 0.5
    if not abs(share - dropout) < allowed:
        raise ValueError(f"the share of dropped weights is off: {share:.3g} instead of {dropout:.3g}")
    if batch * heads > 1 and torch.equal(kept[0, 0], kept[-1, -1]):
        raise ValueError("dropout does not differ between heads")
    return kept


def _compare(
    found: tuple[Tensor, ...],
    inputs: tuple[Tensor, Tensor, Tensor],
    gradient: Tensor,
    kept: Tensor | None,
    dropout: float,
) -> None:
    """Raise a ValueError if `found`, the output and the gradients of q, k and v (B, N, H, D), differ from `unfused`.

    `kept` (B, H, N, N) are the weights that are not dropped; None: all. The batch is compared in slices, because the
    reference keeps its logits in memory.
    """
    batch, tokens, heads, _ = gradient.shape
    size = max(1, PROBE_ELEMENTS // (heads * tokens**2))
    off = torch.zeros(len(found), device=gradient.device)
    largest = torch.zeros_like(off)
    for rows in (slice(start, start + size) for start in range(0, batch, size)):
        with torch.set_grad_enabled(len(found) > 1):
            q, k, v = (x[rows].detach().requires_grad_(len(found) > 1) for x in inputs)
            weights = _weights(q, k)
            if kept is not None:
                weights = weights * kept[rows] / (1 - dropout)
            out = _weighted(weights, v)
            expected = [out.detach()]
            if len(found) > 1:
                expected += torch.autograd.grad(out, (q, k, v), gradient[rows])
        pairs = [(a[rows].float(), b.float()) for a, b in zip(found, expected, strict=True)]
        # torch.maximum propagates NaN, so that a NaN in any slice is found below.
        off = torch.maximum(off, torch.stack([(a - b).abs().max() for a, b in pairs]))
        largest = torch.maximum(largest, torch.stack([b.abs().max() for _, b in pairs]))
    names = ("output", "gradient of q", "gradient of k", "gradient of v")[: len(found)]
    for name, ratio in zip(names, (off / largest).tolist(), strict=True):
        if not math.isfinite(ratio):
            raise ValueError(f"{name} has elements that are infinite or nan")
        if not ratio < PROBE_TOLERANCE:
            raise ValueError(f"{name} is off by {ratio:.2g} of the largest element")


def _default_generator(device: torch.device) -> torch.Generator:
    """The generator from which dropout draws."""
    if device.type != "cuda":
        return torch.default_generator
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]


def _version(name: str) -> str:
    if name.startswith("flash-attn"):
        return f"{name} {version_of(name) or 'of unknown version'}"
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    return f"torch {torch.__version__}" + (f", cuDNN {cudnn}" if cudnn else "")
