"""Save in every ZeRO stage, or load what any number of ranks in any stage saved; write what came out.

Usage: resume_matrix.py FOLDER save
       resume_matrix.py FOLDER load RANKS-STAGE>STAGE ...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from jitscale import parallel
from jitscale.config import ema_name
from jitscale.training.checkpoint import Checkpoint, Progress, load_fragments, write_folder
from jitscale.training.ema import ShardedEma
from jitscale.training.engine import ZeroEngine
from tests.distributed.programs.zero_parity import DECAY, GLOBAL_BATCH, LR, MICRO_BATCH, batch, build, loss_of

SAVED_AT, STEPS = 3, 6


def train(engine: ZeroEngine, ema: ShardedEma, world: parallel.World, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        total = torch.zeros(())
        own = [part[world.rank :: world.size] for part in batch(step)]
        for index in range(engine.micro_batches):
            loss = loss_of(engine, *[part[index * MICRO_BATCH : (index + 1) * MICRO_BATCH] for part in own])
            engine.backward(loss)
            engine.step(LR if index == engine.micro_batches - 1 else None)
            total += loss.detach() / engine.micro_batches / world.size
        ema.update(engine.masters(), step + 1, (step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH))
        losses.append(parallel.sum_over_ranks(total).item())
    return losses


def save(folder: Path, stage: int, world: parallel.World) -> list[float]:
    """Losses of the steps after the save, by the engine that saved."""
    model, config = build(stage, "fp32")
    config.ema.power_widths = []
    engine = ZeroEngine(model, config, world)
    ema = ShardedEma(config.ema, engine.masters())
    train(engine, ema, world, 0, SAVED_AT)
    sets = {"model": engine.masters(), **ema.sets, **engine.moments()}
    progress = Progress(SAVED_AT, SAVED_AT * GLOBAL_BATCH, engine.optimizer_step(), None)
    write_folder(folder / f"{world.size}-{stage}", progress, config, engine.fragments, sets)
    losses = train(engine, ema, world, SAVED_AT, STEPS)
    engine.destroy()
    return losses


def load(checkpoint: Checkpoint, stage: int, world: parallel.World) -> dict[str, object]:
    """Whether the state is what was saved, and the losses of the steps after it."""
    model, config = build(stage, "fp32")
    config.ema.power_widths = []
    engine = ZeroEngine(model, config, world)
    ema = ShardedEma(config.ema, engine.masters())
    load_fragments(checkpoint, engine.fragments, engine.prepare_to_load(checkpoint.progress.optimizer_step))
    load_fragments(checkpoint, engine.fragments, ema.sets)
    engine.finish_loading()
    sets = {"model": engine.masters(), ema_name(DECAY): ema.sets[ema_name(DECAY)], **engine.moments()}
    differing = []
    for name, flats in sets.items():
        whole = engine.gather(flats)
        differing += [f"{name}:{key}" for key, w in whole.items() if not torch.equal(w, checkpoint.tensor(name, key))]
    found = {
        "sets": sorted(sets),
        "differing": differing,
        "optimizer_step": engine.optimizer_step(),
        "losses": train(engine, ema, world, SAVED_AT, STEPS),
    }
    engine.destroy()
    return found


def main() -> None:
    folder, what = Path(sys.argv[1]), sys.argv[2]
    world = parallel.start(torch.device("cpu"))
    results: dict[str, object] = {}
    if what == "save":
        results = {f"{world.size}-{stage}": save(folder, stage, world) for stage in range(4)}
    for pair in sys.argv[3:]:
        source, stage = pair.split(">")
        results[pair] = load(Checkpoint(folder / source), int(stage), world)
    if world.is_main:
        (folder / f"{what}_{world.size}.json").write_text(json.dumps(results))
    parallel.stop()


if __name__ == "__main__":
    main()
