"""Count the bytes that a rank sends in one optimizer step, by stage, precision and type of number; write them.

Usage: planner_traffic.py RESULT.json STAGE-PRECISION ...
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from jitscale import parallel
from jitscale.training.engine import ZeroEngine
from tests.distributed.programs.zero_parity import GLOBAL_BATCH, LR, batch, build, loss_of
from tests.support.processes import leave_after

# A rank sends (n - 1)/n of the whole tensor this many times.
TIMES = {"allreduce_": 2, "_allgather_base_": 1, "_reduce_scatter_base_": 1}
SMALLEST = 1000  # elements; smaller collectives exchange norms and flags


class Traffic(TorchDispatchMode):
    """The bytes that a rank sends, by type of number."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()
        self._part = (ranks - 1) / ranks

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if function.namespace == "c10d":
            name = function.name().removeprefix("c10d::")
            tensors = [t for a in arguments for t in (a if isinstance(a, list) else [a]) if isinstance(t, torch.Tensor)]
            whole = max(tensors, key=torch.Tensor.numel, default=None)
            if whole is not None and whole.numel() >= SMALLEST:
                self.sent[str(whole.dtype)] += round(TIMES[name] * self._part * whole.numel() * whole.element_size())
        return function(*arguments, **(named or {}))


def sent(stage: int, precision: str, world: parallel.World) -> dict[str, int]:
    model, config = build(stage, precision, world.size)
    engine = ZeroEngine(model, config, world)
    size = GLOBAL_BATCH // world.size // engine.micro_batches
    part = [tensor[world.rank * size : (world.rank + 1) * size] for tensor in batch(0)]

    def step() -> None:
        for index in range(engine.micro_batches):
            engine.backward(loss_of(engine, *part))
            engine.step(LR if index == engine.micro_batches - 1 else None)

    step()  # Some communication happens in the first step only.
    with Traffic(world.size) as traffic:
        step()
    engine.destroy()
    return dict(traffic.sent)


def main() -> None:
    world = parallel.start(torch.device("cpu"))
    results = {}
    for setting in sys.argv[2:]:
        stage, precision = setting.split("-")
        results[setting] = sent(int(stage), precision, world)
    if world.is_main:
        Path(sys.argv[1]).write_text(json.dumps(results))
    parallel.stop()


if __name__ == "__main__":
    leave_after(main)
