"""Compare a block's norms and rotation of q and k, and the fused kernels, with float64.

Shapes: B batch, N tokens, H heads, D head dim, C hidden size, I inner width of the feed-forward layer.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import measuring
from benchmarks.correct import ROUNDED, Comparison, distance, random_network, result_of
from benchmarks.suite_items import CONFIGS
from jitscale.config import CHOICES, Config, ModelConfig
from jitscale.errors import ConfigError, first_line
from jitscale.model.execution import prepare
from jitscale.model.jit import JiT
from jitscale.model.layers import ALIGNMENT, NORM_EPS, rope_table, swiglu_width

NORMS_BATCH = {"smoke": 2, "whole": 16}
FUSED_BATCH = {"smoke": 2, "whole": 64}
DEVIATIONS = 6.0  # limit of the error of the share that dropout keeps, in standard deviations
SEED = 1 << 40  # seed of the kernels' dropout: more than 32 bits


def measure(options: argparse.Namespace, config: Config, device: torch.device) -> dict[str, Any]:
    """All comparisons."""
    size = "smoke" if options.smoke else "whole"
    return result_of([*_norms(config, device, size), *fused(config, device, size)])


def _norms(config: Config, device: torch.device, size: str) -> Iterator[Comparison]:
    """Norms and rotation of the same bf16 product, by torch's code and by the kernels that a network can get."""
    ways: dict[str, dict[str, Any]] = {"plain": {"attention": "reference", "fused_kernels": "torch"}}
    ways |= {
        f"fused_kernels={name}": {"fused_kernels": name} for name in CHOICES["engine.fused_kernels"] if name != "auto"
    }
    for label, changes in ways.items():
        torch.manual_seed(0)
        model = replace(config.model, depth=1, in_context_start=0)
        network = random_network(replace(config, model=model)).to(device)
        attention = network.blocks[0].attn
        with torch.no_grad():
            for norm in (attention.q_norm, attention.k_norm):  # type: ignore[union-attr]
                norm.weight.uniform_(0.5, 1.5)  # type: ignore[union-attr, operator]
        fixed: dict[str, Any] = {"precision": "autocast", "align": False, "compile": False, "cuda_graphs": False}
        try:
            prepare(network, replace(config.engine, **fixed, **changes), device, training=True)
        except ConfigError as error:
            yield Comparison(label, None, ROUNDED, f"not runnable here: {first_line(error)}")
            continue
        yield from _compare_norms(label, network, NORMS_BATCH[size])


def _compare_norms(label: str, network: JiT, batch: int) -> Iterator[Comparison]:
    attention: Any = network.blocks[0].attn
    seen: dict[str, Tensor] = {}

    def keep_queries_and_keys(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        seen["q"], seen["k"] = q, k
        return v

    def keep_product(module: Any, inputs: Any, output: Tensor) -> Tensor:
        seen["qkv"] = output.detach().requires_grad_()
        return seen["qkv"]

    attention.kernel = keep_queries_and_keys
    attention.qkv.register_forward_hook(keep_product)
    rope = network.rope
    x = torch.randn(batch, rope.shape[1], network.config.hidden_size, device=rope.device)
    with torch.autocast(rope.device.type, torch.bfloat16):
        attention(x, rope)
    weights = (attention.q_norm.weight, attention.k_norm.weight)
    gradients = [torch.randn_like(seen[name]) for name in "qk"]
    found = torch.autograd.grad([seen["q"], seen["k"]], [seen["qkv"], *weights], gradients)
    qkv, *exact_weights = _doubled(seen["qkv"], *weights)
    exact = exact_heads(qkv, exact_weights, rope.double())[:2]
    expected = torch.autograd.grad(exact, [qkv, *exact_weights], [gradient.double() for gradient in gradients])
    results = [seen["q"], seen["k"], *found]
    names = ("q", "k", "gradient of the product", "gradient of q's weight", "gradient of k's weight")
    for name, a, b in zip(names, results, [*exact, *expected], strict=True):
        yield Comparison(f"{label}: {name}", distance(a, b), ROUNDED)


def exact_heads(qkv: Tensor, weights: list[Tensor], rope: Tensor) -> list[Tensor]:
    """q and k by the formulas of RMS norm and axial rotation, and v: (B, N, 3 H D) -> (B, N, H, D) each."""
    q, k, v = qkv.unflatten(-1, (3, -1, rope.shape[-1])).unbind(2)
    cos, sin = rope[:, :, None]
    rotated = []
    for x, weight in zip((q, k), weights, strict=True):
        normed = _exact_norm(x) * weight
        exchanged = normed.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        rotated.append(normed * cos + exchanged * sin)
    return [*rotated, v]


def _exact_norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + NORM_EPS)


def fused(config: Config, device: torch.device, size: str) -> Iterator[Comparison]:
    """The operators of jitscale/model/fused at the shapes of B, L, H and G, in bf16, forward and backward.

    Each operator yields its result or gradient with the largest error. Tiny sizes use the shape of `config`.
    """
    try:
        # They import triton, which comes with GPUs only.
        from jitscale.model.fused import gated, heads, residual  # noqa: PLC0415
    except ImportError as error:
        yield Comparison("fused kernels", None, ROUNDED, f"not runnable here: {first_line(error)}")
        return
    if device.type != "cuda" and gated.COMPILED:  # not by Triton's interpreter
        yield Comparison("fused kernels", None, ROUNDED, f"not runnable here: they need a GPU, and this is {device}")
        return
    read = measuring.read_config
    models = {name.upper(): read(CONFIGS[name], ["run.max_steps=1000", "tracking.wandb=off"]).model for name in "blhg"}
    for name, model in models.items() if size == "whole" else [("tiny", config.model)]:
        yield from _heads(f"fused kernels, {name}", heads.split_heads, model, device, FUSED_BATCH[size])
        for dropout in (0.0, 0.2):
            label = f"fused kernels, {name}, dropout {dropout}"
            yield from _gate(label, gated.gated_with_seed, model, device, FUSED_BATCH[size], dropout)
            yield from _residual(label, residual, model, device, FUSED_BATCH[size], dropout)


def _heads(
    label: str, operator: Callable[..., Any], model: ModelConfig, device: torch.device, batch: int
) -> Iterator[Comparison]:
    """With and without the in-context tokens, and with gradients in both of the layouts that attention has."""
    draw = _Draws(device)
    heads, head_dim = model.num_heads, model.hidden_size // model.num_heads
    table = rope_table(head_dim, model.image_size // model.patch_size, model.in_context_len).to(device)
    for rope in (table, table[:, model.in_context_len :]):
        tokens = rope.shape[1]
        inputs = [draw(batch, tokens, 3 * heads * head_dim), *(1 + 0.3 * draw(head_dim).float() for _ in range(2))]
        gradients = list(draw(3, batch, tokens, heads, head_dim).unbind())
        by_heads = [gradient.transpose(1, 2).contiguous().transpose(1, 2) for gradient in gradients]
        doubled = _doubled(*inputs)
        exact = exact_heads(doubled[0], doubled[1:], rope.double())
        exact += torch.autograd.grad(exact, doubled, [gradient.double() for gradient in gradients])
        for layout, given in (("tokens first", gradients), ("heads first", by_heads)):
            leaves = [x.detach().requires_grad_() for x in inputs]
            found = list(operator(*leaves, rope))
            found += torch.autograd.grad(found, leaves, given)
            names = ("q", "k", "v", "gradient of qkv", "gradient of q's weight", "gradient of k's weight")
            yield _worst(f"{label}: heads, {tokens} tokens, gradients {layout}", names, found, exact)


def _gate(
    label: str, operator: Callable[..., Tensor], model: ModelConfig, device: torch.device, batch: int, dropout: float
) -> Iterator[Comparison]:
    """At the inner width with its padding."""
    draw, seed = _Draws(device), _seed(dropout, device)
    inner = swiglu_width(model.hidden_size)
    inner += -inner % ALIGNMENT
    h = draw(batch, _tokens(model), 2 * inner).requires_grad_()
    given = draw(batch, _tokens(model), inner)
    found = [operator(h, seed, dropout)]
    found += torch.autograd.grad(found, h, given)
    # The mask comes from a separate call on ones: zeros in `found` may be errors.
    kept = operator(torch.ones_like(h), seed, dropout).detach() != 0
    (doubled,) = _doubled(h)
    gate, value = doubled.chunk(2, -1)
    exact = [F.silu(gate) * value * kept / (1 - dropout)]
    exact += torch.autograd.grad(exact, doubled, given.double())
    yield _worst(f"{label}: gate", ("the output", "its gradient"), found, exact)
    yield from _share(f"{label}: gate", kept, dropout)


def _residual(
    label: str, operators: ModuleType, model: ModelConfig, device: torch.device, batch: int, dropout: float
) -> Iterator[Comparison]:
    """The three steps of a block: a norm, a sum and its norm, and a sum."""
    draw, seed = _Draws(device), _seed(dropout, device)
    shape = (batch, _tokens(model), model.hidden_size)
    inputs = [*(draw(*shape) for _ in range(3)), 1 + 0.3 * draw(model.hidden_size).float()]
    inputs = [x.detach().requires_grad_() for x in (*inputs, 0.3 * draw(batch, 6 * model.hidden_size))]
    gradients = [draw(*shape) for _ in range(3)]
    x, branch, other, weight, modulation = inputs
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)  # strided, as in a block
    out, y2 = operators.add_and_norm(x, branch, gate1, weight, shift2, scale2, seed, dropout)
    found = [operators.modulated_norm(x, weight, shift1, scale1), y2, operators.gated_add(out, other, gate2, None, 0.0)]
    found += torch.autograd.grad(found, inputs, gradients)
    ones = torch.ones(shape, device=device)
    kept = operators.gated_add(0 * ones, ones, ones[:, 0].contiguous(), seed, dropout) != 0
    doubled = _doubled(*inputs)
    shift1, scale1, gate1, shift2, scale2, gate2 = (part[:, None] for part in doubled[4].chunk(6, dim=-1))
    total = doubled[0] + gate1 * (doubled[1] * kept / (1 - dropout))
    exact = [_exact_norm(each) * doubled[3] for each in (doubled[0], total)]
    exact = [exact[0] * (1 + scale1) + shift1, exact[1] * (1 + scale2) + shift2, total + gate2 * doubled[2]]
    exact += torch.autograd.grad(exact, doubled, [gradient.double() for gradient in gradients])
    gradients_of = ("the stream", "branch 1", "branch 2", "weight", "modulation")
    names = ("the first norm", "the second norm", "the last sum", *(f"gradient of {name}" for name in gradients_of))
    yield _worst(f"{label}: residual", names, found, exact)
    yield from _share(f"{label}: residual", kept, dropout)


def _tokens(model: ModelConfig) -> int:
    return (model.image_size // model.patch_size) ** 2 + model.in_context_len


def _seed(dropout: float, device: torch.device) -> Tensor | None:
    return torch.full((1,), SEED, device=device) if dropout > 0 else None


def _doubled(*inputs: Tensor) -> list[Tensor]:
    return [x.detach().double().requires_grad_() for x in inputs]


def _worst(label: str, names: tuple[str, ...], found: list[Tensor], exact: list[Tensor]) -> Comparison:
    """The comparison of the result with the largest error."""
    errors = [distance(a, b) for a, b in zip(found, exact, strict=True)]
    worst = max(range(len(names)), key=errors.__getitem__)
    return Comparison(label, errors[worst], ROUNDED, f"{names[worst]}, the worst of {len(names)}")


def _share(label: str, kept: Tensor, dropout: float) -> Iterator[Comparison]:
    if dropout > 0:
        share = int(kept.count_nonzero()) / kept.numel()
        deviations = abs(share - (1 - dropout)) / (dropout * (1 - dropout) / kept.numel()) ** 0.5
        yield Comparison(f"{label}: the share that is kept", deviations, DEVIATIONS, f"{share:.4f}, in deviations")


class _Draws:
    """Normal values in bf16, the same in each run."""

    def __init__(self, device: torch.device) -> None:
        self._generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        device = self._generator.device
        return torch.randn(shape, generator=self._generator, device=device).bfloat16()
