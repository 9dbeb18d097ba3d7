"""Two ranks use different kernels for sampling, or one of them has none. Write the message of each rank.

Usage: differing_kernels.py KERNEL OF EACH RANK ...
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from jitscale import parallel
from jitscale.config import Config, EngineConfig
from jitscale.errors import UserError
from jitscale.evaluation.generate import ready_on_all_ranks
from jitscale.model.jit import JiT
from jitscale.tracking import Tracker
from jitscale.training.ema import ShardedEma
from jitscale.training.engine import ZeroEngine
from jitscale.training.measurements import Measurements
from jitscale.training.state import RunState
from tests.support.processes import leave_after
from tests.support.tiny import MODEL


def main() -> None:
    world = parallel.start(torch.device("cpu"))
    config = Config(model=MODEL, engine=EngineConfig(precision="fp32"))
    config.data.batch_size = 4
    engine = ZeroEngine(JiT(MODEL), config, world)
    config.engine.attention = sys.argv[1:][world.rank]
    shards: Any = None  # The ranks compare their kernels before they read data.
    tracker = Tracker(config, Path(), active=False, resumed_step=None)
    saved = (engine, ShardedEma(config.ema, engine.masters()), RunState(), tracker)
    measured = Measurements(config, world, shards, *saved, None, 100, lambda: None)
    said: list[Any] = []
    for call in (lambda: ready_on_all_ranks(JiT(MODEL), config, world), measured.on_held_out):
        try:
            call()
        except UserError as error:
            said.append(str(error))
    print(json.dumps(parallel.gather_objects(said)))
    parallel.stop()


if __name__ == "__main__":
    leave_after(main)
