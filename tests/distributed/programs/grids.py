"""Draw a grid of samples from sharded weights, with a guide. Write the networks and the memory of each rank.

Usage: grids.py FOLDER, which has a folder with the number of ranks as its name.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from jitscale import parallel
from jitscale.config import Config, EmaConfig, EngineConfig, EvaluationConfig
from jitscale.errors import UserError
from jitscale.model.jit import JiT, network_holding
from jitscale.tracking import Tracker
from jitscale.training import measurements
from jitscale.training.ema import ShardedEma
from jitscale.training.engine import ZeroEngine
from jitscale.training.state import RunState
from tests.support.processes import leave_after
from tests.support.tiny import MODEL

NAME = "ema_0.9"


def random_network(seed: int) -> JiT:
    """A network whose output is not zero."""
    torch.manual_seed(seed)
    network = JiT(MODEL)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return network


def main() -> None:
    world = parallel.start(torch.device("cpu"))
    evaluation = EvaluationConfig(weights=NAME, guidance_scale=2.0, steps=2)
    engine = EngineConfig(zero_stage=2, precision="fp32")
    config = Config(model=MODEL, engine=engine, evaluation=evaluation, ema=EmaConfig(decays=[0.9]))
    config.data.batch_size = 6
    parallel.BUCKET_ELEMENTS = 8192  # several buckets
    engine = ZeroEngine(random_network(0), config, world)
    built: list[Any] = []

    def counted(weights: dict[str, torch.Tensor], *settings: Any) -> JiT:
        built.append(network_holding(weights, *settings))
        same = dict(built[-1].named_parameters())
        assert all(same[name].data_ptr() == tensor.data_ptr() for name, tensor in weights.items()), (
            "the rank holds no second copy of the weights"
        )
        return built[-1]

    measurements.network_holding = counted
    config.tracking.wandb = "off"
    folder = Path(sys.argv[1]) / str(world.size)
    tracker = Tracker(config, folder, active=world.is_main, resumed_step=None)
    saved = (engine, ShardedEma(config.ema, engine.masters()), RunState(), tracker)
    shards: Any = None  # A grid reads no data.
    measured = measurements.Measurements(config, world, shards, *saved, random_network(1).eval(), 100, lambda: None)
    measured.grid("samples", evaluation)
    sets = [dict(network.named_parameters()) for network in built]
    if world.is_main:
        for found, seed in zip(sets, (0, 1), strict=True):
            assert all(torch.equal(found[name], p) for name, p in random_network(seed).named_parameters())
    facts: dict[str, Any] = {"built": len(built)}
    next(iter(saved[1].sets[NAME])).fill_(float("nan"))
    try:
        measured.grid("samples", evaluation)
    except UserError as error:
        facts["error"] = str(error)
    print(json.dumps(parallel.gather_objects(facts)))
    parallel.stop()


if __name__ == "__main__":
    leave_after(main)
