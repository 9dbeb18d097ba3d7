"""Train the same network on the same global batches in every ZeRO stage, and in plain torch; write what came out.

Usage: zero_parity.py RESULT.json [bf16]: fp32 in all stages for many steps; with the word, other precisions and what
happens to gradients that are not finite.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from jitscale import parallel
from jitscale.config import (
    Config,
    DiffusionConfig,
    EmaConfig,
    EngineConfig,
    ModelConfig,
    OptimConfig,
    ema_name,
    power_name,
)
from jitscale.diffusion.objective import interpolate, sample_loss
from jitscale.model.jit import JiT
from jitscale.training.ema import ShardedEma
from jitscale.training.engine import ZeroEngine
from jitscale.training.optim import build_optimizer

GLOBAL_BATCH, MICRO_BATCH, DECAY, LR = 12, 2, 0.9, 3e-3
MANY_STEPS, FEW_STEPS = 50, 10
POWER_WIDTH, POWER_GAMMA = 0.05, 16.972199  # arXiv 2312.02696
MODEL = ModelConfig(
    image_size=16,
    patch_size=4,
    hidden_size=64,
    depth=3,
    num_heads=2,
    bottleneck_dim=8,
    in_context_len=4,
    in_context_start=1,
    num_classes=10,
)


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


def build(stage: int, precision: str) -> tuple[JiT, Config]:
    torch.manual_seed(0)
    config = Config(
        model=MODEL,
        optim=OptimConfig(grad_clip=1.0),
        engine=EngineConfig(zero_stage=stage, precision=precision, micro_batch_size=MICRO_BATCH),
        ema=EmaConfig(decays=[DECAY], power_widths=[POWER_WIDTH]),
    )
    config.data.batch_size = GLOBAL_BATCH
    return JiT(MODEL), config


def train_plain(steps: int) -> dict[str, object]:
    model, config = build(0, "fp32")
    optimizer = build_optimizer(model, config.optim)
    losses, norms = [], []
    for step in range(steps):
        loss = loss_of(model, *batch(step))
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip)))
        for group in optimizer.param_groups:
            group["lr"] = LR
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses, "norms": norms, "model": dict(model.named_parameters())}


class PlainAverages:
    """The averages of whole weights, beside which those in shards are laid."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self.ema = {name: w.clone() for name, w in weights.items()}
        self.power = {name: torch.zeros_like(w) for name, w in weights.items()}

    def update(self, weights: dict[str, torch.Tensor], step: int) -> None:
        for name, w in weights.items():
            self.ema[name].lerp_(w, 1 - DECAY)
            self.power[name].lerp_(w, 1 - (step / (step + 1)) ** (POWER_GAMMA + 1))


def train_engine(
    stage: int, precision: str, world: parallel.World, steps: int, poison: bool = False
) -> dict[str, object]:
    model, config = build(stage, precision)
    engine = ZeroEngine(model, config, world)
    ema = ShardedEma(config.ema, engine.masters())
    plain = PlainAverages(engine.gather(engine.masters()))
    losses, norms, applied = [], [], []
    for step in range(steps):
        total = torch.zeros(())
        whole = [part[world.rank :: world.size] for part in batch(step)]
        for index in range(engine.micro_batches):
            parts = [part[index * MICRO_BATCH : (index + 1) * MICRO_BATCH] for part in whole]
            loss = loss_of(engine, *parts)
            if poison and step == 0 and world.rank == world.size - 1:
                loss = loss * float("nan")
            engine.backward(loss)
            last = index == engine.micro_batches - 1
            moved = engine.step(LR if last else None)
            total += loss.detach() / engine.micro_batches / world.size
        applied.append(moved)
        ema.update(engine.masters(), step + 1, (step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH), moved=moved)
        plain.update(engine.gather(engine.masters()), step)
        losses.append(parallel.sum_over_ranks(total).item())
        norms.append(engine.gradient_norm())
    result = {
        "losses": losses,
        "norms": norms,
        "applied": applied,
        "model": engine.gather(engine.masters()),
        "ema_off": largest_difference(engine.gather(ema.sets[ema_name(DECAY)]), plain.ema),
        "power_off": largest_difference(engine.gather(ema.sets[power_name(POWER_WIDTH)]), plain.power),
        "owned": sum(f.length for f in engine.fragments),
        "tables": [str(model.pos_embed.dtype), str(model.rope.dtype)],
    }
    engine.destroy()
    return result


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).detach().norm() / (b[name].detach().norm() + 1e-12)) for name in a)


def main() -> None:
    world = parallel.start(torch.device("cpu"))
    fp32 = "bf16" not in sys.argv[2:]
    steps = MANY_STEPS if fp32 else FEW_STEPS
    plain = train_plain(steps)
    results = {"plain": {"losses": plain["losses"], "norms": plain["norms"]}}
    settings = [(s, "fp32") for s in range(4)] if fp32 else [(s, p) for s in (1, 2, 3) for p in ("autocast", "bf16")]
    for stage, precision in settings:
        run = train_engine(stage, precision, world, steps)
        results[f"{stage} {precision}"] = {
            **{key: run[key] for key in ("losses", "norms", "ema_off", "power_off", "tables")},
            "weights_off": largest_difference(run["model"], plain["model"]),  # type: ignore[arg-type]
            "owned": parallel.gather_objects(run["owned"]),
        }
    for stage in () if fp32 else range(4):
        run = train_engine(stage, "fp32", world, 2, poison=True)
        results[f"{stage} poisoned"] = {
            "applied": run["applied"],
            "finite": all(bool(w.isfinite().all()) for w in run["model"].values()),  # type: ignore[attr-defined]
        }
    results["parameters"] = sum(p.numel() for p in JiT(MODEL).parameters())  # type: ignore[assignment]
    if world.is_main:
        Path(sys.argv[1]).write_text(json.dumps(results))
    parallel.stop()


if __name__ == "__main__":
    main()
