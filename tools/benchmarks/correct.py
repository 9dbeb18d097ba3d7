"""What the device computes, next to float64: attention's kernels, the network, norms and rotation, CUDA graphs.

`gradients` and the two cases of training are in files of their own. A case yields comparisons: each an error, its limit
and whether it holds. The error is the distance from the expected values, relative to their size, both as 2-norms.
"""

import argparse
import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import measuring
from benchmarks.suite_items import CONFIGS, SMALL_NETWORK
from jitscale.config import CHOICES, Config, EngineConfig
from jitscale.errors import ConfigError, UserError, first_line
from jitscale.model.attention import KERNELS, choose_kernel
from jitscale.model.cuda_graphs import CudaGraphs
from jitscale.model.execution import prepare
from jitscale.model.jit import JiT
from jitscale.model.layers import NORM_EPS
from jitscale.parallel import choose_device

ELSEWHERE = {"gradients": "correct_gradients", "training": "correct_training", "training-zero": "correct_training"}
ROUNDED = 0.006  # results of bf16 arithmetic inside float32: a rounding at the beginning and one at the end
KERNEL_LIMIT = 0.02  # attention in bf16, whose weights are rounded too
WORSE_THAN_PLAIN = 1.5  # the network's error may be so many times that of plain bf16 arithmetic
FLOAT8_WORSE = 20.0
DRAWS = {"smoke": 8, "whole": 64}  # of dropout
WEIGHTS_DEVIATION = 0.02  # of what a fresh network sets to zero


class Comparison(NamedTuple):
    """How far a result is from what was expected; None: it could not be computed, for a reason."""

    name: str
    error: float | None
    limit: float
    note: str = ""

    @property
    def holds(self) -> bool:
        """Whether the error is within the limit."""
        return self.error is not None and self.error <= self.limit


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All comparisons of the case."""
    settings = ["run.max_steps=1000", "tracking.wandb=off", *(SMALL_NETWORK if options.smoke else [])]
    config = measuring.read_config(CONFIGS["h"], settings)
    device = choose_device(config.run.device)
    if options.case in ELSEWHERE:
        module = importlib.import_module(f"benchmarks.{ELSEWHERE[options.case]}")
        return module.measure(options, config, device)
    torch.backends.cuda.matmul.allow_tf32 = False
    cases: dict[str, Callable[..., Iterator[Comparison]]] = {
        "attention": _attention,
        "network": _network,
        "network-compiled": partial(_network, compiled=True),
        "norms": _norms,
        "graphs": _graphs,
    }
    return result_of(list(cases[options.case](config, device, "smoke" if options.smoke else "whole")))


def result_of(comparisons: Sequence[Comparison], **more: Any) -> dict[str, Any]:
    """What `measure` returns."""
    listed = [{**comparison._asdict(), "holds": comparison.holds} for comparison in comparisons]
    wrong = [comparison.name for comparison in comparisons if comparison.error is not None and not comparison.holds]
    return {"comparisons": listed, "wrong": wrong, **more}


def describe(result: dict[str, Any]) -> measuring.Table:
    """The lines of the table of `measure`."""
    lines = [(found["name"], describe_comparison(found)) for found in result["comparisons"]]
    return [*lines, ("wrong", ", ".join(result["wrong"]) or "nothing")]


def describe_comparison(found: dict[str, Any]) -> str:
    """The error and its limit."""
    if found["error"] is None:
        return f"not computed: {found['note']}"
    verdict, note = "" if found["holds"] else "WRONG: ", f", {found['note']}" if found["note"] else ""
    return f"{verdict}{found['error']:.2g} (at most {found['limit']:.2g}){note}"


def distance(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||, in float64; infinite if something is not finite."""
    expected = expected.detach().double()
    value = float((found.detach().double() - expected).norm() / expected.norm().clamp_min(1e-300))
    return float("inf") if math.isnan(value) else value


def exact_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(D)) v in float64: (B, N, H, D) each."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    return (weights @ v).transpose(1, 2)


def _attention(config: Config, device: torch.device, size: str) -> Iterator[Comparison]:
    """Every kernel at every head dim and length; with dropout, the mean over masks, which is the result without."""
    batch, heads = (1, 2) if size == "smoke" else (4, 16)
    for head_dim, tokens in product((64, 80, 104), (256, 288)):
        packed = torch.randn(batch, tokens, 3, heads, head_dim, device=device, dtype=torch.bfloat16)
        gradient = torch.randn(batch, tokens, heads, head_dim, device=device, dtype=torch.bfloat16)
        expected = _with_gradients(exact_attention, packed, gradient, 0.0)
        noise: tuple[float, ...] = ()  # the distance of the plain way's mean over masks
        for dropout, name in product((0.0, 0.2), sorted(KERNELS, key=lambda name: name != "reference")):
            label = f"{name}, head dim {head_dim}, {tokens} tokens, dropout {dropout}"
            try:
                choose_kernel(
                    name,
                    tokens=[tokens],
                    heads=heads,
                    head_dim=head_dim,
                    dropouts=[dropout],
                    dtype=torch.bfloat16,
                    device=device,
                )
                draws = 1 if dropout == 0 else DRAWS[size]
                means = [torch.zeros_like(part) for part in expected]
                for _ in range(draws):
                    found = _with_gradients(KERNELS[name], packed, gradient, dropout)
                    torch._foreach_add_(means, found, alpha=1 / draws)
            except ConfigError as error:
                yield Comparison(label, None, KERNEL_LIMIT, first_line(error))
                continue
            errors = tuple(distance(mean, part) for mean, part in zip(means, expected, strict=True))
            if dropout > 0 and name == "reference":
                noise = errors
            limits = [KERNEL_LIMIT] * 2 if dropout == 0 else [WORSE_THAN_PLAIN * value for value in noise]
            for what, off, limit in zip(("output", "gradients"), errors, limits, strict=True):
                note = f"mean of {draws} masks" if dropout else ""
                yield Comparison(f"{label}: {what}", off, limit, note)


def _with_gradients(
    kernel: Callable[[Tensor, Tensor, Tensor, float], Tensor], packed: Tensor, gradient: Tensor, dropout: float
) -> tuple[Tensor, Tensor]:
    """Output and the gradient of `packed` (B, N, 3, H, D), in float64."""
    packed = packed.detach().requires_grad_()
    q, k, v = packed.unbind(2)
    out = kernel(q, k, v, dropout)
    (found,) = torch.autograd.grad(out, packed, gradient.to(out.dtype))
    return out.detach().double(), found.double()


def _network(config: Config, device: torch.device, size: str, *, compiled: bool = False) -> Iterator[Comparison]:
    """Three blocks of JiT-H by each way to compute them that is `compiled`, or that is not; without dropout."""
    model = replace(config.model, depth=3, in_context_start=1, attn_dropout=0.0, proj_dropout=0.0)
    batch = 2 if size == "smoke" else 8
    torch.manual_seed(0)
    exact = _random_network(replace(config, model=model)).to(device)
    stored = {name: value.clone() for name, value in exact.state_dict().items()}
    z, gradient = (torch.randn(batch, 3, model.image_size, model.image_size, device=device) for _ in range(2))
    t, y = torch.rand(batch, device=device), torch.randint(model.num_classes, (batch,), device=device)
    for block in exact.blocks:
        block.attn.kernel = exact_attention  # type: ignore[union-attr]
    expected = _passes(exact.double(), z.double(), t.double(), y, gradient.double())
    plain: dict[str, float] = {}  # errors of plain bf16 arithmetic
    for label, changes in _ways():
        if label != "plain" and changes.get("compile", False) != compiled:
            continue
        unknown = [name for name in changes if name not in {field.name for field in fields(EngineConfig)}]
        wrong = [f"{k}={v}" for k, v in changes.items() if v not in CHOICES.get(f"engine.{k}", (v,))]
        if unknown or wrong:
            yield Comparison(label, None, 0.0, f"this checkout has no engine.{(unknown or wrong)[0]}")
            continue
        network = JiT(model, config.diffusion).to(device).train()
        network.load_state_dict(stored)
        engine = replace(config.engine, **{"precision": "autocast", "align": False, "compile": False, **changes})
        try:
            execution = prepare(network, engine, device, training=True)
            with torch.autocast(device.type, torch.bfloat16):
                found = _passes(network, z, t, y, gradient)
        except (UserError, RuntimeError) as error:
            yield Comparison(label, None, 0.0, first_line(error))
            continue
        errors = {name: distance(found[name], expected[name]) for name in expected}
        plain = plain or errors
        times = FLOAT8_WORSE if "float8" in changes else WORSE_THAN_PLAIN
        for name in ("output", "gradients"):
            yield Comparison(f"{label}: {name}", errors[name], times * plain[name], str(execution))
        # A wrong gradient of a small parameter is lost among all; it is not next to that of plain arithmetic.
        worst = max(errors, key=lambda name: errors[name] / max(plain[name], ROUNDED))
        times_plain = errors[worst] / max(plain[worst], ROUNDED)
        yield Comparison(f"{label}: {worst}, times the error of plain bf16", times_plain, 2 * times)


def _ways() -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and settings of `engine`; the first is plain bf16 arithmetic, with which the others are compared."""
    yield "plain", {"attention": "reference"}
    for name in CHOICES["engine.attention"]:
        yield f"attention={name}", {"attention": name}
    yield "align", {"align": True}
    yield "compile", {"compile": True}
    yield "compile, align", {"compile": True, "align": True}
    yield "compile, align, recomputed", {"compile": True, "align": True, "activation_checkpointing": 1}
    for name in ("torch", "triton"):
        yield f"fused_kernels={name}", {"fused_kernels": name}
        yield f"compile, align, fused_kernels={name}", {"fused_kernels": name, "compile": True, "align": True}
    yield "compile, align, cuda_graphs", {"compile": True, "align": True, "cuda_graphs": True}
    yield "float8", {"align": True, "float8": True}


def _random_network(config: Config) -> JiT:
    """A network none of whose weights are zero, so that every part has an influence."""
    network = JiT(config.model, config.diffusion).train()
    for name, parameter in network.named_parameters():
        if not parameter.any():
            gates = name.endswith("adaLN_modulation.1.bias")  # with small ones the blocks would change little
            torch.nn.init.normal_(parameter, std=1.0 if gates else WEIGHTS_DEVIATION)
    return network


def _passes(network: JiT, z: Tensor, t: Tensor, y: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    """The prediction, each parameter's gradient, and all gradients in one vector."""
    prediction = network(z, t, y)
    prediction.backward(gradient.to(prediction.dtype))
    found = {name: p.grad.double() for name, p in network.named_parameters() if p.grad is not None}
    whole = torch.cat([each.flatten() for each in found.values()])
    return {"output": prediction, "gradients": whole, **{f"gradient of {name}": each for name, each in found.items()}}


def _norms(config: Config, device: torch.device, size: str) -> Iterator[Comparison]:
    """Norm and rotation of q and k as a block computes them, from the same bf16 product."""
    batch = 2 if size == "smoke" else 16
    for label, changes in _ways():
        if label != "plain" and "fused_kernels" not in changes:
            continue
        if "fused_kernels" in changes and "engine.fused_kernels" not in CHOICES:
            yield Comparison(label, None, 0.0, "this checkout has no engine.fused_kernels")
            continue
        torch.manual_seed(0)
        model = replace(config.model, depth=1, in_context_start=0)
        network = _random_network(replace(config, model=model)).to(device)
        attention = network.blocks[0].attn
        with torch.no_grad():
            for norm in (attention.q_norm, attention.k_norm):  # type: ignore[union-attr]
                norm.weight.uniform_(0.5, 1.5)  # type: ignore[union-attr, operator]
        engine = replace(config.engine, **{"precision": "autocast", "align": False, **changes, "compile": False})
        try:
            prepare(network, engine, device, training=True)
        except ConfigError as error:
            yield Comparison(label, None, 0.0, first_line(error))
            continue
        yield from _compare_norms(label, network, batch)


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
    qkv = seen["qkv"].detach().double().requires_grad_()
    exact_weights = [weight.detach().double().requires_grad_() for weight in weights]
    q, k, _ = qkv.unflatten(-1, (3, attention.num_heads, -1)).unbind(2)
    exact = [_exact_norm_and_rotation(x, w, rope.double()) for x, w in zip((q, k), exact_weights, strict=True)]
    expected = torch.autograd.grad(exact, [qkv, *exact_weights], [gradient.double() for gradient in gradients])
    results = [seen["q"], seen["k"], *found]
    names = ("q", "k", "gradient of the product", "gradient of q's weight", "gradient of k's weight")
    for name, a, b in zip(names, results, [*exact, *expected], strict=True):
        yield Comparison(f"{label}: {name}", distance(a, b), ROUNDED)


def _exact_norm_and_rotation(x: Tensor, weight: Tensor, rope: Tensor) -> Tensor:
    """RMS norm and axial rotation of (B, N, H, D) in float64, by their formulas."""
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + NORM_EPS) * weight
    cos, sin = rope[:, :, None]
    exchanged = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return x * cos + exchanged * sin


@torch.no_grad()
def _graphs(config: Config, device: torch.device, size: str) -> Iterator[Comparison]:
    """Predictions by one CUDA graph, next to the same network without: at two sizes of a batch, with new inputs."""
    if device.type != "cuda":
        raise UserError("CUDA graphs need a GPU")
    model = replace(config.model, depth=3, in_context_start=1)
    torch.manual_seed(0)
    network = _random_network(replace(config, model=model)).to(device).eval()
    prepare(network, replace(config.engine, precision="autocast"), device, training=False)
    graphs = CudaGraphs(network.forward)
    with torch.autocast(device.type, torch.bfloat16):
        for batch, again in product((2, 8), range(3)):
            z = torch.randn(batch, 3, model.image_size, model.image_size, device=device)
            t, y = torch.rand(batch, device=device), torch.randint(model.num_classes, (batch,), device=device)
            error = distance(graphs(z, t, y), network(z, t, y))
            yield Comparison(f"{batch} images, replayed {again} times before", error, 1e-3)
