"""Compare the device's results with float64: attention kernels, and the network in each way to compute it.

The other cases are in files of their own (`ELSEWHERE`). A case yields comparisons: each has an error and its limit. The
error is the distance from the expected values, relative to their size, both as 2-norms.
"""

import argparse
import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import measuring
from benchmarks.suite_items import CONFIGS, SMALL_NETWORK
from jitscale.config import CHOICES, Config, EngineConfig, image_shape
from jitscale.errors import ConfigError, UserError, first_line
from jitscale.model.attention import KERNELS, choose_kernel
from jitscale.model.execution import prepare
from jitscale.model.jit import JiT
from jitscale.parallel import choose_device

ELSEWHERE = {"gradients": "correct_gradients", "norms": "correct_norms", "graphs": "correct_graphs"}
ELSEWHERE |= {"training": "correct_training", "training-zero": "correct_training"}
ROUNDED = 0.006  # limit for float32 arithmetic between a rounding to bf16 at the beginning and one at the end
KERNEL_LIMIT = 0.02  # attention in bf16, whose weights are rounded too
WORSE_THAN_PLAIN = 1.5  # limit of the network's error, as a multiple of plain bf16 arithmetic's
FLOAT8_WORSE = 20.0
DRAWS = {"smoke": 8, "whole": 64}  # number of draws of dropout
GRAPH_PASSES = 3
WEIGHTS_DEVIATION = 0.02  # standard deviation for weights that a fresh network sets to zero


class Comparison(NamedTuple):
    """The error of a result; None if it could not be computed, and then `note` says why."""

    name: str
    error: float | None
    limit: float
    note: str = ""

    @property
    def holds(self) -> bool:
        """True if the error is within the limit."""
        return self.error is not None and self.error <= self.limit


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All comparisons of the case."""
    settings = ["run.max_steps=1000", "tracking.wandb=off", *(SMALL_NETWORK if options.smoke else [])]
    config = measuring.read_config(CONFIGS["h"], settings)
    device = choose_device(config.run.device)
    torch.backends.cuda.matmul.allow_tf32 = False
    if options.case in ELSEWHERE:
        module = importlib.import_module(f"benchmarks.{ELSEWHERE[options.case]}")
        found: dict[str, Any] = module.measure(options, config, device)
        return found
    cases: dict[str, Callable[..., Iterator[Comparison]]] = {
        "attention": _attention,
        "network": _network,
        "network-compiled": partial(_network, compiled=True),
    }
    return result_of(list(cases[options.case](config, device, "smoke" if options.smoke else "whole")))


def result_of(comparisons: Sequence[Comparison], **more: Any) -> dict[str, Any]:
    """The result of `measure`."""
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
    """||found - expected|| / ||expected||, in float64; infinite if a value is not finite."""
    expected = expected.detach().double()
    value = float((found.detach().double() - expected).norm() / expected.norm().clamp_min(1e-300))
    return float("inf") if math.isnan(value) else value


def exact_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(D)) v in float64: (B, N, H, D) each."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    return (weights @ v).transpose(1, 2)


def _attention(config: Config, device: torch.device, size: str) -> Iterator[Comparison]:
    """Every kernel at every head dim and length. With dropout, the mean over masks must be the result without."""
    batch, heads = (1, 2) if size == "smoke" else (4, 16)
    for head_dim, tokens in product((64, 80, 104), (256, 288)):
        packed = torch.randn(batch, tokens, 3, heads, head_dim, device=device, dtype=torch.bfloat16)
        gradient = torch.randn(batch, tokens, heads, head_dim, device=device, dtype=torch.bfloat16)
        expected = _with_gradients(exact_attention, packed, gradient, 0.0)
        noise: tuple[float, ...] = ()  # the error of the plain kernel's mean over masks
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
    """Three blocks of JiT-H without dropout, in each compiled way (`compiled`) or in each other way."""
    model = replace(config.model, depth=3, in_context_start=1, attn_dropout=0.0, proj_dropout=0.0)
    batch = 2 if size == "smoke" else 8
    torch.manual_seed(0)
    exact = random_network(replace(config, model=model)).to(device)
    stored = {name: value.clone() for name, value in exact.state_dict().items()}
    z, gradient = (torch.randn(batch, *image_shape(model), device=device) for _ in range(2))
    t, y = torch.rand(batch, device=device), torch.randint(model.num_classes, (batch,), device=device)
    for block in exact.blocks:
        block.attn.kernel = exact_attention  # type: ignore[union-attr]
    expected = _differentiated(exact.double(), z.double(), t.double(), y, gradient.double())
    plain: dict[str, float] = {}  # errors of plain bf16 arithmetic
    for label, changes in ways():
        if label != "plain" and changes.get("compile", False) != compiled:
            continue
        graphs = changes.get("cuda_graphs", False)
        unknown = [name for name in changes if name not in {field.name for field in fields(EngineConfig)}]
        wrong = [f"{k}={v}" for k, v in changes.items() if v not in CHOICES.get(f"engine.{k}", (v,))]
        if unknown or wrong:
            yield Comparison(label, None, 0.0, f"this checkout has no engine.{(unknown or wrong)[0]}")
            continue
        network = JiT(model, config.diffusion).to(device).train()
        network.load_state_dict(stored)
        fixed = {"precision": "autocast", "align": False, "compile": False, "cuda_graphs": False}
        engine = replace(config.engine, **{**fixed, **changes})
        try:
            execution = prepare(network, engine, device, training=True, batch=batch)
            with counted_replays() as replays:
                # The first pass runs without a graph, the second is captured, and the compared one is replayed.
                for _ in range(GRAPH_PASSES - 1 if graphs else 0):
                    _pass(network, torch.randn_like(z), torch.rand_like(t), y.flip(0), torch.randn_like(gradient))
                    network.zero_grad()
                found = _pass(network, z, t, y, gradient)
        except (UserError, RuntimeError) as error:
            # Every GPU supports graphs, so their error is a failure and not a missing feature.
            failed = graphs and not isinstance(error, UserError)
            yield Comparison(label, float("inf") if failed else None, 0.0, first_line(error))
            continue
        if graphs:
            missing = 2 * model.depth * (GRAPH_PASSES - 1) - len(replays)
            yield Comparison(f"{label}: passes of blocks without a graph", float(abs(missing)), 0.0)
        errors = {name: distance(found[name], expected[name]) for name in expected}
        plain = plain or errors
        times = FLOAT8_WORSE if "float8" in changes else WORSE_THAN_PLAIN
        for name in ("output", "gradients"):
            yield Comparison(f"{label}: {name}", errors[name], times * plain[name], str(execution))
        # The error of one small parameter vanishes in the norm over all gradients, so each one is compared alone too.
        worst = max(errors, key=lambda name: errors[name] / max(plain[name], ROUNDED))
        times_plain = errors[worst] / max(plain[worst], ROUNDED)
        yield Comparison(f"{label}: {worst}, times the error of plain bf16", times_plain, 2 * times)


def ways() -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and settings of `engine`; the first is plain bf16 arithmetic, the base of the limits of the others."""
    yield "plain", {"attention": "reference", "fused_kernels": "torch"}
    for name in CHOICES["engine.attention"]:
        yield f"attention={name}", {"attention": name}
    yield "align", {"align": True}
    yield "compile", {"compile": True}
    yield "compile, align", {"compile": True, "align": True}
    yield "compile, align, recomputed", {"compile": True, "align": True, "activation_checkpointing": 1}
    for name in ("torch", "triton"):
        yield f"fused_kernels={name}", {"fused_kernels": name}
        yield f"compile, align, fused_kernels={name}", {"fused_kernels": name, "compile": True, "align": True}
    for changes in ({}, {"compile": True, "align": True}):
        label = ", ".join([*changes, "cuda_graphs"])
        yield label, {**changes, "cuda_graphs": True}
        yield f"{label}, recomputed", {**changes, "cuda_graphs": True, "activation_checkpointing": 1}
    yield "float8", {"align": True, "float8": True}


def random_network(config: Config) -> JiT:
    """A network, ready to train, without zero weights, so that every part influences the result."""
    network = JiT(config.model, config.diffusion).train()
    for name, parameter in network.named_parameters():
        if not parameter.any():
            gates = name.endswith("adaLN_modulation.1.bias")  # with small gates the blocks would change little
            torch.nn.init.normal_(parameter, std=1.0 if gates else WEIGHTS_DEVIATION)
    return network


def _pass(network: JiT, z: Tensor, t: Tensor, y: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    with torch.autocast(z.device.type, torch.bfloat16):
        return _differentiated(network, z, t, y, gradient)


def _differentiated(network: JiT, z: Tensor, t: Tensor, y: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    """The prediction, each parameter's gradient, and all gradients in one vector."""
    prediction = network(z, t, y)
    prediction.backward(gradient.to(prediction.dtype))
    found = {name: p.grad.double() for name, p in network.named_parameters() if p.grad is not None}
    whole = torch.cat([each.flatten() for each in found.values()])
    return {"output": prediction, "gradients": whole, **{f"gradient of {name}": each for name, each in found.items()}}


@contextmanager
def counted_replays() -> Iterator[list[torch.cuda.CUDAGraph]]:
    """List the replays of CUDA graphs inside the `with` statement: the graph, once for each replay."""
    replays: list[torch.cuda.CUDAGraph] = []
    replay = torch.cuda.CUDAGraph.replay

    def counted(graph: torch.cuda.CUDAGraph) -> None:
        replays.append(graph)
        replay(graph)

    torch.cuda.CUDAGraph.replay = counted  # type: ignore[method-assign, assignment]
    try:
        yield replays
    finally:
        torch.cuda.CUDAGraph.replay = replay  # type: ignore[method-assign]
