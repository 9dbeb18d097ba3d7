"""Decides whether a network uses the fused kernels: a probe compares them with torch's code at the network's shapes.

Shapes: B batch, N tokens, H heads, D head dim, I inner width of the feed-forward layer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from jitscale.errors import ConfigError, first_line
from jitscale.model import layers
from jitscale.versions import version_of

BATCH = 5  # images of the probe: several programs for a token in `heads`' forward pass, a part of one in its backward
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.01}  # relative to the largest element
ALIGNED_ELEMENTS = 8  # as training.optim.parameter_groups aligns parameters: compiled code assumes 16 bytes
OLDEST_TORCH = (2, 11)  # the oldest torch whose Inductor was tested with the kernels
DEVIATIONS = 6  # standard errors by which the share that dropout keeps may deviate


@dataclass(frozen=True)
class FusedKernels:
    """The operators to use; None means torch's code.

    `split_heads` is for `layers.Attention`, `gated` for `layers.SwiGLU`, `residual` for the blocks and the final layer.
    """

    name: str  # triton or torch
    version: str  # version of Triton; empty for torch
    reason: str
    split_heads: layers.SplitHeads | None = field(default=None, repr=False)
    gated: layers.Gated | None = field(default=None, repr=False)
    residual: layers.ResidualKernels | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return " ".join(part for part in (self.name, self.version, f"({self.reason})") if part)


@dataclass(frozen=True)
class Shapes:
    """Shapes and dtypes of a network's blocks."""

    grid: int  # tokens per side of the image
    prefix: int  # in-context tokens
    heads: int
    head_dim: int
    inner: int  # I, with padding
    dropouts: Sequence[float]  # rates in the feed-forward layers
    dtype: torch.dtype  # dtype of products
    weight_dtype: torch.dtype  # dtype of the norms' weights
    routed: int = 0  # tokens of an image that pass the routed blocks; 0: no routed blocks


def choose_fused(asked: str, shapes: Shapes, device: torch.device) -> FusedKernels:
    """The kernels `asked`: triton, torch, or for "auto" Triton's on GPUs in bf16 if they pass a probe.

    The probe runs the operator of the heads at every number of tokens, and those of the gate and the residual at every
    dropout, forward and backward, and compares them with torch's code in float32. It does not use the default
    generators. Raises a ConfigError with the reason if Triton's kernels are requested and do not work.
    """
    if asked == "torch":
        return FusedKernels("torch", "", "requested")
    if device.type != "cuda":
        if asked == "triton":
            raise ConfigError(f"engine.fused_kernels=triton needs a GPU, and this is {device}; choose auto or torch")
        return FusedKernels("torch", "", device.type)
    if asked == "auto" and shapes.dtype == torch.float32:
        return FusedKernels("torch", "", f"{device.type}, float32")
    if asked == "auto" and tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        return FusedKernels("torch", "", f"torch {torch.__version__}: Triton's kernels are tested from 2.11 on")
    try:
        if shapes.head_dim % ALIGNED_ELEMENTS:
            raise ValueError(f"head dim {shapes.head_dim} is not a multiple of {ALIGNED_ELEMENTS}")
        # A late import, because these modules import triton, which torch installs for GPUs only.
        from jitscale.model.fused import gated, heads, residual  # noqa: PLC0415

        _try_split_heads(heads.split_heads, shapes, device)
        _try_gated(gated.gated_with_seed, shapes, device)
        _try_residual(residual, shapes, device)
    except Exception as error:  # compilers of kernels may raise any type; the reason is logged or raised
        why = f"{type(error).__name__}: {first_line(error)}"
        if asked == "triton":
            case = f"{shapes.heads} heads of {shapes.head_dim}, inner width {shapes.inner}, {shapes.dtype}, {device}"
            raise ConfigError(
                f"engine.fused_kernels=triton does not work here ({why}); {case}; choose auto or torch"
            ) from error
        return FusedKernels("torch", "", f"triton: {why}")
    reason = "requested" if asked == "triton" else "agrees with torch"
    version = version_of("triton") or "of unknown version"
    return FusedKernels("triton", version, reason, heads.split_heads, gated.gated, residual.KERNELS)


def _try_split_heads(operator: layers.SplitHeads, shapes: Shapes, device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(0)
    tolerance = TOLERANCE[shapes.dtype]
    random = partial(torch.randn, generator=generator, device=device, dtype=shapes.dtype)
    table = layers.rope_table(shapes.head_dim, shapes.grid, shapes.prefix).to(device)
    q_norm, k_norm = (layers.RMSNorm(shapes.head_dim).to(device, shapes.weight_dtype) for _ in range(2))
    with torch.no_grad():
        for norm in (q_norm, k_norm):
            norm.weight.uniform_(0.5, 1.5, generator=generator)
    ropes: dict[object, Tensor] = {shapes.prefix: table[:, shapes.prefix :], 0: table}  # views as in the network
    if shapes.routed:  # images have different tokens
        draws = torch.rand(BATCH, shapes.grid**2, generator=generator, device=device)
        order = draws.argsort(1)[:, : shapes.routed]
        classes = table[:, None, : shapes.prefix].expand(-1, BATCH, -1, -1)
        own = table[:, shapes.prefix :][:, order]
        ropes |= {"routed": own, "routed, with class tokens": torch.cat([classes, own], dim=2)}
    for rope in ropes.values():
        tokens, routed = rope.shape[-2], " routed" if rope.dim() == 4 else ""
        qkv = random(BATCH, tokens, 3 * shapes.heads * shapes.head_dim).requires_grad_()
        # Attention's kernels return gradients that are contiguous as (B, N, H, D) or as (B, H, N, D).
        contiguous = random(3, BATCH, tokens, shapes.heads, shapes.head_dim).unbind()
        for gradients in (contiguous, [g.transpose(1, 2).contiguous().transpose(1, 2) for g in contiguous]):
            inputs = (qkv, q_norm.weight, k_norm.weight)
            with torch.enable_grad(), torch.autocast(device.type, enabled=False):
                found = operator(*inputs, rope)
                found_gradients = torch.autograd.grad(found, inputs, gradients)
                expected = layers.split_heads(qkv.float(), q_norm, k_norm, rope)
                expected_gradients = torch.autograd.grad(expected, inputs, [g.float() for g in gradients])
            names = ("q", "k", "v", "gradient of qkv", "gradient of q's weight", "gradient of k's weight")
            for name, a, b in zip(names, (*found, *found_gradients), (*expected, *expected_gradients), strict=True):
                _probe(f"{name} at {tokens}{routed} tokens", a, b, tolerance)


def _try_gated(
    operator: Callable[[Tensor, Tensor | None, float], Tensor], shapes: Shapes, device: torch.device
) -> None:
    generator = torch.Generator(device).manual_seed(0)
    tokens = shapes.grid**2 + shapes.prefix
    tolerance = TOLERANCE[shapes.dtype]
    random = partial(torch.randn, generator=generator, device=device, dtype=shapes.dtype)
    h = random(BATCH, tokens, 2 * shapes.inner).requires_grad_()
    gradient = random(BATCH, tokens, shapes.inner)
    for dropout in sorted(set(shapes.dropouts)):
        seed = torch.full((1,), 1 << 40, device=device) if dropout > 0 else None
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            found = operator(h, seed, dropout)
            (found_gradient,) = torch.autograd.grad(found, h, gradient)
            kept = (operator(torch.ones_like(h), seed, dropout) != 0).float()
            expected = layers.gated(h.float()) * kept / (1 - dropout)
            (expected_gradient,) = torch.autograd.grad(expected, h, gradient.float())
        case = f"the gate at dropout {dropout}"
        _probe(f"the output of {case}", found, expected, tolerance)
        _probe(f"the gradient of {case}", found_gradient, expected_gradient, tolerance)
        if dropout > 0:
            deviation = (dropout / (1 - dropout) / kept.numel()) ** 0.5
            _probe(f"the share kept by {case}", kept.mean(), kept.new_tensor(1 - dropout), DEVIATIONS * deviation)


def _try_residual(kernels: ModuleType, shapes: Shapes, device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(0)
    tolerance = TOLERANCE[shapes.dtype]
    random = partial(torch.randn, generator=generator, device=device, dtype=shapes.dtype)
    tokens, width = shapes.grid**2 + shapes.prefix, shapes.heads * shapes.head_dim
    x, branch = (random(BATCH, tokens, width).requires_grad_() for _ in range(2))
    weight = random(width).to(shapes.weight_dtype).requires_grad_()
    modulation = random(BATCH, 3 * width).requires_grad_()
    gradients = [random(BATCH, tokens, width) for _ in range(2)]
    inputs = (x, branch, weight, modulation)

    def torch_code(kept: Tensor) -> tuple[Tensor, Tensor]:
        gate, shift, scale = modulation.float().chunk(3, dim=-1)
        out = x.float() + gate[:, None] * (branch.float() * kept)
        return out, layers.modulate(layers.rms_norm(out, weight.float()), shift, scale)

    for dropout in sorted(set(shapes.dropouts)):
        seed = torch.full((1,), 1 << 40, device=device) if dropout > 0 else None
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            gate, shift, scale = modulation.chunk(3, dim=-1)
            found = kernels.add_and_norm(x, branch, gate, weight, shift, scale, seed, dropout)
            found_gradients = torch.autograd.grad(found, inputs, gradients)
            ones = torch.ones_like(x.float())
            kept = kernels.gated_add(torch.zeros_like(ones), ones, ones[:, 0], seed, dropout).detach()
            expected = torch_code(kept)
            expected_gradients = torch.autograd.grad(expected, inputs, [g.float() for g in gradients])
        names = ("sum", "norm", "gradient of x", "of the branch", "of the norm's weight", "of the modulation")
        for name, a, b in zip(names, (*found, *found_gradients), (*expected, *expected_gradients), strict=True):
            _probe(f"the residual's {name} at dropout {dropout}", a, b, tolerance)


def _probe(name: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Compare the results of a kernel and of torch's code; `tolerance` is relative to the largest element."""
    off = float((found.detach().float() - expected.detach().float()).abs().max() / expected.detach().abs().max())
    if not off < tolerance:
        raise ValueError(f"{name} is off by {off:.2g} of the largest element")
