"""Reduce the gradients of a few parameters. Write their largest differences from a mean computed in one piece.

Usage: reducer.py RESULT.json

Each rank uses the parameters in a different order. It leaves one parameter out, a different one in each pass.
"""

import json
import sys
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from jitscale import parallel
from jitscale.training.reducer import Reducer
from tests.support.processes import leave_after

# The part of a rank ends inside a parameter.
GROUPS = [[(3, 5), (17,), (2, 2, 2), (31, 3), (1,)], [(7,), (4, 6)], [(2,)]]
BUCKETS = [1, 40, 10_000]  # in elements: one parameter each, a few parameters, all parameters
PASSES, STEPS = 3, 2


def optimizer_of(parameters: list[list[torch.Tensor]], stage: int, world: parallel.World) -> Any:
    """A stand-in with the attributes of DeepSpeed's optimizer that the reducer reads and replaces."""
    sizes = [-(-sum(p.numel() for p in group) // (2 * world.size)) * 2 for group in parameters]  # includes the padding
    optimizer: Any = SimpleNamespace(
        partition_gradients=stage == 2,
        partition_size=sizes,
        single_partition_of_fp32_groups=[torch.zeros(size, requires_grad=True) for size in sizes],
        round_robin_bit16_groups=parameters,
        round_robin_bit16_offsets=[[0, *accumulate(p.numel() for p in group[:-1])] for group in parameters],
        communication_data_type=parameters[0][0].dtype,
        unflatten=_unflatten_dense_tensors,
        averaged_gradients={},
        _grad_acc_hooks=[],
    )
    optimizer.last = False
    optimizer.is_gradient_accumulation_boundary = lambda: optimizer.last
    return optimizer


def factors(step: int, rank: int, ranks: int, count: int) -> Iterator[list[tuple[int, float]]]:
    """For each pass: the parameters in the order of their use on this rank, and their gradients."""
    for number in range(PASSES):
        order = torch.randperm(count, generator=torch.Generator().manual_seed(100 * step + 10 * number + rank)).tolist()
        left_out = (rank + number) % count
        # These are small integers: they are exact in bf16. So is their sum times a number of ranks that is a power of
        # two.
        yield [(i, float(ranks * (1 + i + rank + number + step))) for i in order if i != left_out]


def largest_difference(stage: int, dtype: torch.dtype, elements: int, world: parallel.World, collective: bool) -> float:
    parameters = [[torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in group] for group in GROUPS]
    all_of_them = [p for group in parameters for p in group]
    optimizer = optimizer_of(parameters, stage, world)
    Reducer(optimizer, all_of_them, elements, collective=collective)
    end = optimizer.overlapping_partition_gradients_reduce_epilogue if stage == 2 else optimizer.reduce_gradients
    differences = []
    for step in range(STEPS):
        for number, used in enumerate(factors(step, world.rank, world.size, len(all_of_them))):
            optimizer.last = number == PASSES - 1
            loss = sum((all_of_them[i] * factor).sum() for i, factor in used)
            optimizer.scale_if_loss(loss).backward()
            if stage == 2 or optimizer.last:
                end()
                assert all(p.grad is None for p in all_of_them)
        mean = [torch.zeros(p.shape) for p in all_of_them]
        for rank in range(world.size):
            for used in factors(step, rank, world.size, len(all_of_them)):
                for i, factor in used:
                    mean[i] += factor / world.size
        for index, group in enumerate(parameters):
            (found,) = optimizer.averaged_gradients.pop(index)
            wanted = torch.zeros(world.size * len(found))
            first = sum(len(before) for before in parameters[:index])
            whole = _flatten_dense_tensors(mean[first : first + len(group)])
            wanted[: len(whole)] = whole
            assert found.dtype == torch.float32
            differences.append((found - wanted.chunk(world.size)[world.rank]).abs().max())
    return float(torch.stack(differences).max())  # One NaN makes the result NaN.


def main() -> None:
    world = parallel.start(torch.device("cpu"))
    torch.use_deterministic_algorithms(True)  # Memory that is not initialised is filled with NaN.
    results = {
        f"{stage} {dtype} {elements}": parallel.gather_objects(
            largest_difference(stage, dtype, elements, world, collective=stage == 2)
        )
        for stage in (1, 2)
        for dtype in (torch.float32, torch.bfloat16)
        for elements in BUCKETS
    }
    if world.is_main:
        Path(sys.argv[1]).write_text(json.dumps(results))
    parallel.stop()


leave_after(main)
