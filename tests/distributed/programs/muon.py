"""Train with Muon in every ZeRO stage and in plain torch. Save in one stage, resume in the next. Write the results.

Usage: muon.py RESULT.json FOLDER
"""

import json
import sys
from pathlib import Path

import torch

from jitscale import parallel
from jitscale.checkpoints.format import Checkpoint, Progress, load_fragments, step_folder, whole_fragments
from jitscale.checkpoints.saving import write_folder
from jitscale.config import Config, EngineConfig, OptimConfig
from jitscale.model.jit import JiT
from jitscale.training.engine import ZeroEngine
from jitscale.training.muon import Muon
from jitscale.training.optim import build_optimizer
from tests.distributed.programs.zero_parity import GLOBAL_BATCH, MODEL, batch, loss_of
from tests.support.processes import leave_after

STEPS, SAVED_AT, LR, CLIP = 6, 3, 3e-3, 0.5


def build(stage: int, precision: str = "fp32") -> tuple[JiT, Config]:
    torch.manual_seed(0)
    config = Config(
        model=MODEL,
        optim=OptimConfig(name="muon", weight_decay=0.1, grad_clip=CLIP),
        engine=EngineConfig(zero_stage=stage, precision=precision, micro_batch_size=2),
    )
    config.data.batch_size = GLOBAL_BATCH
    return JiT(MODEL), config


def images_of(step: int) -> tuple[torch.Tensor, ...]:
    """One of two batches, so that the loss must decrease."""
    return batch(step % 2)


def plain() -> list[float]:
    model, config = build(0)
    optimizer = build_optimizer(model, config.optim)
    assert isinstance(optimizer, Muon)
    matrices = [p for group in optimizer.param_groups if group["muon"] for p in group["params"]]
    whole = whole_fragments({str(index): tuple(p.shape) for index, p in enumerate(matrices)})
    optimizer.lay_out({f.flat: matrices[f.flat] for f in whole}, [whole], rank=0)
    losses = []
    for step in range(STEPS):
        loss = loss_of(model, *images_of(step))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = LR
        optimizer.step()
        losses.append(loss.item())
    return losses


def steps(engine: ZeroEngine, world: parallel.World, numbers: range) -> list[float]:
    losses = []
    for step in numbers:
        total = torch.zeros(())
        own = [part[world.rank :: world.size] for part in images_of(step)]
        for index in range(engine.micro_batches):
            loss = loss_of(engine, *[part[index * 2 : (index + 1) * 2] for part in own])
            engine.backward(loss)
            engine.step(LR if index == engine.micro_batches - 1 else None)
            total += loss.detach() / engine.micro_batches / world.size
        losses.append(parallel.sum_over_ranks(total).item())
    return losses


def main() -> None:
    world = parallel.start(torch.device("cpu"))
    folder = Path(sys.argv[2])
    results: dict[str, list[float]] = {"plain": plain()}
    for stage, then in ((0, 1), (1, 2), (2, 3), (3, 0)):
        model, config = build(stage)
        engine = ZeroEngine(model, config, world)
        losses = steps(engine, world, range(SAVED_AT))
        progress = Progress(stage, 0, engine.optimizer_step(), None)
        sets = {"model": engine.masters(), **engine.moments()}
        write_folder(step_folder(folder, progress.step), progress, config, engine.fragments, sets)
        results[f"stage {stage}"] = losses + steps(engine, world, range(SAVED_AT, STEPS))
        engine.destroy()

        checkpoint = Checkpoint(folder / "checkpoints" / f"step_{stage:08d}")
        model, config = build(then)
        engine = ZeroEngine(model, config, world)
        load_fragments(checkpoint, engine.fragments, engine.prepare_to_load(checkpoint.progress.optimizer_step))
        engine.finish_loading()
        results[f"stage {stage} then {then}"] = losses + steps(engine, world, range(SAVED_AT, STEPS))
        engine.destroy()
    for stage in (1, 3):
        engine = ZeroEngine(*build(stage, "bf16"), world)
        results[f"bf16 stage {stage}"] = steps(engine, world, range(STEPS))
        engine.destroy()
    if world.is_main:
        Path(sys.argv[1]).write_text(json.dumps(results))
    parallel.stop()


if __name__ == "__main__":
    leave_after(main)
