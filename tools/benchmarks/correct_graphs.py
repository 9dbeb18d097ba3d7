"""Compare CUDA graphs with the same passes without graphs: predictions, and losses and gradients of training.

Sampling is also compared with float64. The cases `network` and `network-compiled` compare the gradients of training in
graphs with float64.
"""

import argparse
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.correct import (
    WORSE_THAN_PLAIN,
    Comparison,
    counted_replays,
    distance,
    exact_attention,
    random_network,
    result_of,
)
from jitscale.config import Config, ModelConfig, image_shape
from jitscale.errors import UserError, first_line
from jitscale.model.cuda_graphs import CudaGraphs
from jitscale.model.execution import prepare

DEPTH = 3
STEPS = 3  # the first micro-batch runs without a graph, the second is captured
BATCH = {"smoke": 2, "whole": 8}
LEARNING_RATE = 1e-3  # weights must change, so that graphs that still use the old ones are noticed
# Compiled, dropout, activation checkpointing, micro-batches. Few cases are compiled, because that takes long.
CASES = [*product((False,), (0.0, 0.2), (0, 1), (1, 2)), (True, 0.0, 0, 1), (True, 0.2, 0, 2), (True, 0.2, 1, 2)]


def measure(options: argparse.Namespace, config: Config, device: torch.device) -> dict[str, Any]:
    """All comparisons. Raises a UserError without a GPU."""
    if device.type != "cuda":
        raise UserError("CUDA graphs need a GPU")
    size = "smoke" if options.smoke else "whole"
    return result_of([*_sampling(config, device), *training(config, device, size)])


@torch.no_grad()
def _sampling(config: Config, device: torch.device) -> Iterator[Comparison]:
    """Predictions by one CUDA graph: at two sizes of a batch, with new inputs."""
    model = replace(config.model, depth=DEPTH, in_context_start=1)
    torch.manual_seed(0)
    network = random_network(replace(config, model=model)).to(device).eval()
    exact = deepcopy(network).double()
    for block in exact.blocks:
        block.attn.kernel = exact_attention  # type: ignore[union-attr]
    prepare(network, replace(config.engine, precision="autocast"), device, training=False)
    graphs = CudaGraphs(network.forward)
    for batch, again in product((2, 8), range(3)):
        z, t, y = _inputs(model, batch, device, seed=again)
        with torch.autocast(device.type, torch.bfloat16):
            found, plain = graphs(z, t, y), network(z, t, y)
        label = f"{batch} images, replayed {again} times before"
        yield Comparison(label, distance(found, plain), 1e-3)
        expected = exact(z.double(), t.double(), y)
        limit = WORSE_THAN_PLAIN * distance(plain, expected)
        yield Comparison(f"{label}, next to float64", distance(found, expected), limit)


def training(config: Config, device: torch.device, size: str) -> Iterator[Comparison]:
    """A few steps with graphs and without, from the same seeds, compared bit by bit."""
    for compiled, dropout, every, micro_batches in CASES:
        label = f"training, {'compiled' if compiled else 'not compiled'}, dropout {dropout}, "
        label += f"{'recomputed, ' if every else ''}{micro_batches} micro-batches"
        model = replace(config.model, depth=DEPTH, in_context_start=1, attn_dropout=dropout, proj_dropout=dropout)
        engine = replace(config.engine, precision="autocast", compile=compiled, activation_checkpointing=every)
        ways = [replace(config, model=model, engine=replace(engine, cuda_graphs=graphs)) for graphs in (False, True)]
        try:
            plain, _ = _trained(ways[0], device, BATCH[size], micro_batches)
            found, replays = _trained(ways[1], device, BATCH[size], micro_batches)
        except UserError as error:
            yield Comparison(label, None, 0.0, first_line(error))
            continue
        except RuntimeError as error:  # raised by a capture or a replay
            yield Comparison(label, float("inf"), 0.0, first_line(error))
            continue
        different = _different(found, plain)
        note = f"of {len(plain)} losses and gradients"
        if different:
            again, _ = _trained(ways[0], device, BATCH[size], micro_batches)
            note += f"; without graphs, a second run has {_different(again, plain)}"
        yield Comparison(f"{label}: different", float(different), 0.0, note)
        wanted = 2 * DEPTH * (STEPS * micro_batches - 1)
        yield Comparison(f"{label}: passes of blocks without a graph", float(abs(wanted - replays)), 0.0)


def _trained(config: Config, device: torch.device, batch: int, micro_batches: int) -> tuple[list[Tensor], int]:
    """The losses and gradients of `STEPS` steps, and the number of replays."""
    torch.manual_seed(0)
    network = random_network(config).to(device)
    prepare(network, config.engine, device, training=True, batch=batch, micro_batches=micro_batches)
    kept: list[Tensor] = []
    with counted_replays() as replays:
        for step in range(STEPS):
            torch.manual_seed(step)
            for micro_batch in range(micro_batches):
                z, t, y = _inputs(config.model, batch, device, seed=100 * step + micro_batch)
                with torch.autocast(device.type, torch.bfloat16):
                    loss = (network(z, t, y) - z).square().mean()
                loss.backward()
                kept.append(loss.detach().clone())
            with torch.no_grad():
                for parameter in network.parameters():
                    if parameter.grad is not None:
                        kept.append(parameter.grad.clone())
                        parameter.sub_(parameter.grad, alpha=LEARNING_RATE)
                        parameter.grad = None
    return kept, len(replays)


def _different(found: list[Tensor], expected: list[Tensor]) -> int:
    return sum(not same(a, b) for a, b in zip(found, expected, strict=True))


def same(a: Tensor, b: Tensor) -> bool:
    """True if all bits are the same; NaN equals nothing."""
    return torch.equal(a, b)


def _inputs(model: ModelConfig, batch: int, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """z (B, A, S, S), t and y (B,), independent of the state of the default generators."""
    draws = torch.Generator().manual_seed(seed)
    z = torch.randn(batch, *image_shape(model), generator=draws)
    t, y = torch.rand(batch, generator=draws), torch.randint(model.num_classes, (batch,), generator=draws)
    return z.to(device), t.to(device), y.to(device)
