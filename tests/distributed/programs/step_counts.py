"""Count the collectives and the host waits of a step, operator by operator, in every stage.

Usage: step_counts.py RESULT.json
"""

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.step import host_waits
from jitscale import parallel
from jitscale.training.ema import ShardedEma
from jitscale.training.engine import ZeroEngine
from tests.distributed.programs.zero_parity import GLOBAL_BATCH, LR, STAGES, batch, build, loss_of
from tests.support.processes import leave_after

WAYS = [(stage, "fp32") for stage in STAGES]
WAYS += [(stage, precision) for precision in ("autocast", "bf16") for stage in STAGES if stage > 0]


def collectives(run: Callable[[], object]) -> dict[str, int]:
    """The number of calls of each collective in `run`."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    found: Counter[str] = Counter()
    for event in profiler.key_averages():
        if event.key.startswith("c10d::"):
            found[event.key.removeprefix("c10d::").strip("_")] += event.count
    return dict(found)


def count(stage: int, precision: str, world: parallel.World) -> dict[str, Any]:
    model, config = build(stage, precision, world.size)
    engine = ZeroEngine(model, config, world)
    ema = ShardedEma(config.ema, engine.masters())
    size = GLOBAL_BATCH // world.size // engine.micro_batches
    part = [tensor[world.rank * size : (world.rank + 1) * size] for tensor in batch(0)]

    def micro_batch(*, last: bool) -> None:
        engine.backward(loss_of(engine, *part))
        moved = engine.step(LR if last else None)
        if last:
            ema.update(engine.masters(), 1, (0, GLOBAL_BATCH), moved=moved)

    def step() -> None:
        for index in range(engine.micro_batches):
            micro_batch(last=index == engine.micro_batches - 1)

    step()  # Some communication happens in the first step only.
    found = {
        "waits": host_waits(step, world.device, compiled=False),
        "collectives": [
            collectives(lambda index=index: micro_batch(last=index == engine.micro_batches - 1))  # type: ignore[misc]
            for index in range(engine.micro_batches)
        ],
    }
    engine.destroy()
    return found


def main() -> None:
    world = parallel.start(torch.device("cpu"))
    results = {f"{stage} {precision}": count(stage, precision, world) for stage, precision in WAYS}
    if world.is_main:
        Path(sys.argv[1]).write_text(json.dumps(results))
    parallel.stop()


leave_after(main)
