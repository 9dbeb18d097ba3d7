"""Run the same few steps in each execution mode, through the engine. Write the losses and the compiler's counters.

Usage: executions.py RESULT.json STAGE WAY ...
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

from jitscale import parallel
from jitscale.config import Config, EngineConfig
from jitscale.model.jit import JiT
from jitscale.training.engine import ZeroEngine
from tests.support import tiny
from tests.support.processes import leave_after

STEPS, BATCH = 4, 3
# The modes pad the feed-forward layers, compile the blocks, and recompute every k-th block.
WAYS = {"plain": (False, False, 0), "padded": (True, False, 0), "compiled": (True, True, 0), "all": (True, True, 2)}
MODEL = replace(tiny.MODEL, hidden_size=40, depth=4, in_context_start=2)


def run(engine_config: EngineConfig, world: parallel.World) -> dict[str, Any]:
    torch._dynamo.reset()
    counters.clear()
    config = Config(model=MODEL, engine=engine_config)
    config.data.batch_size = BATCH * world.size
    torch.manual_seed(0)
    network = JiT(MODEL).train()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    engine = ZeroEngine(network, config, world)
    losses = []
    for step in range(STEPS):
        torch.manual_seed(100 * step + world.rank)
        loss = engine(torch.randn(BATCH, 3, 16, 16), torch.rand(BATCH), torch.arange(BATCH)).square().mean()
        engine.backward(loss)
        engine.step(1e-3)
        losses.append(float(parallel.sum_over_ranks(loss.detach())))
    engine.destroy()
    counted = {"graphs": counters["stats"]["unique_graphs"], "breaks": len(counters["graph_break"])}
    return {"losses": losses, **counted}


def main() -> None:
    world = parallel.start(torch.device("cpu"))
    compiler = torch.compile
    # The compiler builds the graphs and their derivatives as for a GPU, but does not call a C++ compiler for them.
    torch.compile = lambda function, **rest: compiler(function, **{**rest, "backend": "aot_eager"})
    results = {}
    for name in sys.argv[3:]:
        align, compiled, every = WAYS[name]
        engine = EngineConfig(
            zero_stage=int(sys.argv[2]), precision="fp32", align=align, compile=compiled, activation_checkpointing=every
        )
        results[name] = run(engine, world)
    if world.is_main:
        Path(sys.argv[1]).write_text(json.dumps(results))
    parallel.stop()


leave_after(main)
