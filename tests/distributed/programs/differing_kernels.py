"""Two ranks use different kernels for sampling, or one of them has none. Write the message of each rank.

Usage: differing_kernels.py KERNEL OF EACH RANK ...
"""

import json
import sys
from typing import Any
from unittest.mock import Mock

import torch

from jitscale import parallel
from jitscale.config import Config, EngineConfig
from jitscale.errors import UserError
from jitscale.evaluation.generate import ready_on_all_ranks
from jitscale.model.jit import JiT
from jitscale.training.measurements import Measurements
from jitscale.training.state import RunState
from tests.support.processes import leave_after
from tests.support.tiny import MODEL


def main() -> None:
    world = parallel.start(torch.device("cpu"))
    engine = Mock()
    engine.stored_buffers.return_value = {}
    engine.gather.side_effect = lambda _: {key: p.detach().clone() for key, p in JiT(MODEL).named_parameters()}
    kernel = sys.argv[1:][world.rank]
    config = Config(model=MODEL, engine=EngineConfig(precision="fp32", attention=kernel))
    measured = Measurements(config, world, Mock(), engine, Mock(), RunState(), Mock(), None, 100, lambda: None)
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
