"""Train the same network on the same global batches in every ZeRO stage and in plain torch. Write the results.

Usage: zero_parity.py RESULT.json STEPS 'STAGE KIND' ..., where KIND is fp32, autocast, bf16 or poisoned (with a NaN).
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from jitscale import parallel
from jitscale.config import (
    Config,
    DiffusionConfig,
    EmaConfig,
    EngineConfig,
    OptimConfig,
    ema_name,
    power_name,
)
from jitscale.diffusion.objective import interpolate, sample_loss
from jitscale.model.jit import JiT
from jitscale.training.ema import ShardedEma
from jitscale.training.engine import ZeroEngine
from jitscale.training.optim import build_optimizer
from tests.support import tiny
from tests.support.processes import leave_after

STAGES = (0, 1, 2, 3)
# number of steps in bf16, and with a NaN in the first step; STEPS counts steps in fp32
ROUNDED_STEPS, POISONED_STEPS = 10, 2
GLOBAL_BATCH, DECAY, LR = 12, 0.9, 1e-3
MICRO_BATCH = {1: 4, 2: 3, 3: 2}  # by number of ranks; 3, 2 and 2 micro-batches are accumulated
POWER_WIDTH, POWER_GAMMA = 0.05, 16.972199  # arXiv 2312.02696
MODEL = replace(tiny.MODEL, hidden_size=64)


def batch(step: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(GLOBAL_BATCH, 3, 16, 16, generator=generator)
    e = torch.randn(GLOBAL_BATCH, 3, 16, 16, generator=generator)
    t = torch.rand(GLOBAL_BATCH, generator=generator)
    y = torch.randint(0, 11, (GLOBAL_BATCH,), generator=generator)
    return x, e, t, y


def loss_of(net: object, x: torch.Tensor, e: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    z = interpolate(x, e, t)
    return sample_loss(net(z, t, y), x, e, z, t, DiffusionConfig()).mean()  # type: ignore[operator]


def build(stage: int, precision: str, ranks: int) -> tuple[JiT, Config]:
    torch.manual_seed(0)
    config = Config(
        model=MODEL,
        optim=OptimConfig(grad_clip=1.0),
        engine=EngineConfig(zero_stage=stage, precision=precision, micro_batch_size=MICRO_BATCH[ranks]),
        ema=EmaConfig(decays=[DECAY], power_widths=[POWER_WIDTH]),
    )
    config.data.batch_size = GLOBAL_BATCH
    return JiT(MODEL), config


class Averages:
    """The two averages of whole weights, computed by their definition."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self.decaying = {name: w.clone() for name, w in weights.items()}
        self.power = {name: torch.zeros_like(w) for name, w in weights.items()}

    def update(self, weights: dict[str, torch.Tensor], step: int) -> None:
        for name, w in weights.items():
            self.decaying[name].lerp_(w, 1 - DECAY)
            self.power[name].lerp_(w, 1 - (step / (step + 1)) ** (POWER_GAMMA + 1))


def train_plain(steps: int) -> dict[str, Any]:
    model, config = build(0, "fp32", 1)
    optimizer = build_optimizer(model, config.optim)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    averages = Averages(weights)
    losses, norms = [], []
    for step in range(steps):
        loss = loss_of(model, *batch(step))
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip)))
        for group in optimizer.param_groups:
            group["lr"] = LR
        optimizer.step()
        averages.update(weights, step)
        losses.append(loss.item())
    return {"losses": losses, "norms": norms, "weights": weights, "averages": averages}


def train_step(engine: ZeroEngine, ema: ShardedEma, step: int, *, poison: bool = False) -> tuple[float, bool]:
    """One step on this rank's part of the global batch, with a NaN in the last rank's loss if `poison`.

    Returns:
        The loss of the global batch, and whether the weights moved.
    """
    world, size = engine.world, MICRO_BATCH[engine.world.size]
    total, moved = torch.zeros(()), torch.tensor(False)
    whole = [part[world.rank :: world.size] for part in batch(step)]
    for index in range(engine.micro_batches):
        loss = loss_of(engine, *(part[index * size : (index + 1) * size] for part in whole))
        if poison and world.rank == world.size - 1:
            loss = loss * float("nan")
        engine.backward(loss)
        moved = engine.step(LR if index == engine.micro_batches - 1 else None)
        total += loss.detach() / engine.micro_batches / world.size
    ema.update(engine.masters(), step + 1, (step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH), moved=moved)
    return parallel.sum_over_ranks(total).item(), bool(moved)


def train_engine(stage: int, kind: str, world: parallel.World, plain: dict[str, Any]) -> dict[str, Any]:
    """Train in one stage.

    Returns the largest differences from plain torch, and from averages of the engine's own weights.
    """
    poisoned = kind.startswith("poisoned")
    precision = kind.removeprefix("poisoned").lstrip("-") or "fp32"
    model, config = build(stage, precision, world.size)
    engine = ZeroEngine(model, config, world)
    ema = ShardedEma(config.ema, engine.masters())
    own = Averages(engine.gather(engine.masters()))
    losses, norms, applied = [], [], []
    steps = len(plain["losses"])
    for step in range(POISONED_STEPS if poisoned else steps if precision == "fp32" else ROUNDED_STEPS):
        loss, moved = train_step(engine, ema, step, poison=poisoned and step == 0)
        losses.append(loss)
        applied.append(moved)
        norms.append(engine.gradient_norm())
        own.update(engine.gather(engine.masters()), step)
    weights = engine.gather(engine.masters())
    decaying, power = (engine.gather(ema.sets[name]) for name in (ema_name(DECAY), power_name(POWER_WIDTH)))
    engine.destroy()
    return {
        "losses": losses,
        "norms": norms,
        "applied": applied,
        "finite": all(bool(w.isfinite().all()) for w in weights.values()),
        "weights_off": largest_difference(weights, plain["weights"]),
        "ema_off": largest_difference(decaying, plain["averages"].decaying),
        "power_off": largest_difference(power, plain["averages"].power),
        "own_ema_off": largest_difference(decaying, own.decaying),
        "own_power_off": largest_difference(power, own.power),
        "owned": parallel.gather_objects(sum(f.length for f in engine.fragments)),
        "tables": [str(model.pos_embed.dtype), str(model.rope.dtype)],
    }


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest relative error among the tensors of `a`, in the 2-norm."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).norm() / (b[name].norm() + 1e-12)) for name in a)


def main() -> None:
    world = parallel.start(torch.device("cpu"))
    plain = train_plain(int(sys.argv[2]))
    results: dict[str, Any] = {"plain": {"losses": plain["losses"], "norms": plain["norms"]}}
    results["parameters"] = sum(w.numel() for w in plain["weights"].values())
    for training in sys.argv[3:]:
        stage, kind = training.split()
        results[training] = train_engine(int(stage), kind, world, plain)
    if world.is_main:
        Path(sys.argv[1]).write_text(json.dumps(results))
    parallel.stop()


if __name__ == "__main__":
    leave_after(main)
