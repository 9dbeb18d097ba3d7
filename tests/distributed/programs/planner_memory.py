"""Measure the bytes of each rank in every stage and precision; write them.

Usage: planner_memory.py RESULT.json [STAGE-PRECISION ...]
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.memory import MICRO_BATCHES, state_bytes
from jitscale import parallel
from jitscale.config import Config, EmaConfig, EngineConfig
from tests.support import tiny
from tests.support.processes import leave_after

MODEL = replace(tiny.MODEL, hidden_size=320, depth=4, num_heads=4, bottleneck_dim=32)
SETTINGS = [(0, "fp32")] + [(stage, p) for stage in (1, 2, 3) for p in ("fp32", "autocast", "bf16")]


def measured_run(stage: int, precision: str) -> Config:
    engine = EngineConfig(zero_stage=stage, precision=precision, micro_batch_size=1)
    return Config(model=MODEL, engine=engine, ema=EmaConfig(decays=[0.9, 0.99]))


def measure(stage: int, precision: str, world: parallel.World) -> dict[str, int]:
    config = measured_run(stage, precision)
    config.data.batch_size = MICRO_BATCHES * world.size
    return state_bytes(config, world)


def main() -> None:
    world = parallel.start(torch.device("cpu"))
    chosen = sys.argv[2:]
    results = {
        f"{stage}-{precision}": parallel.gather_objects(measure(stage, precision, world))
        for stage, precision in SETTINGS
        if not chosen or f"{stage}-{precision}" in chosen
    }
    if world.is_main:
        Path(sys.argv[1]).write_text(json.dumps(results))
    parallel.stop()


if __name__ == "__main__":
    leave_after(main)
