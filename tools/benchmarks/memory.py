"""Measure the bytes that each rank holds in the middle of a step: the summed storages of all its tensors."""

import argparse
import gc
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.measuring import CPU, Table, measured_config
from jitscale import parallel
from jitscale.config import Config, image_shape
from jitscale.errors import UserError
from jitscale.model.jit import JiT
from jitscale.planner.memory import BUCKET_ELEMENTS, state_memory
from jitscale.training.ema import ShardedEma
from jitscale.training.engine import ZeroEngine

MICRO_BATCHES = 2


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Bytes of every rank in each of `options.stages`, and the planner's prediction."""
    stages = {}
    with parallel.joined(CPU) as world:
        # Between two micro-batches of a step, gradients exist and activations do not.
        options.batch = MICRO_BATCHES * world.size
        for stage in tqdm(options.stages, unit="stage", desc="measure", disable=not world.is_main):
            settings = [f"engine.zero_stage={stage}", "engine.micro_batch_size=1"]
            config, _ = measured_config(options, settings, on_gpu=False)
            held = parallel.gather_objects(state_bytes(config, world))
            stages[str(stage)] = {"bytes": held, "predicted": state_memory(config, world.size).state}
    if not world.is_main:
        raise SystemExit(0)  # the main rank prints
    return {"ranks": world.size, "stages": stages}


def describe(result: dict[str, Any]) -> Table:
    """The lines of the table of `measure`."""
    lines = [("ranks", str(result["ranks"]))]
    for stage, found in result["stages"].items():
        most = max(rank["state"] for rank in found["bytes"])
        buckets = max(rank["buckets"] for rank in found["bytes"])
        text = f"{most / 1e9:.3f} GB per rank (planner: {found['predicted'] / 1e9:.3f})"
        lines.append((f"stage {stage}", text + (f", and a bucket of {buckets / 1e9:.2f} GB" if buckets else "")))
    return lines


def state_bytes(config: Config, world: parallel.World) -> dict[str, int]:
    """This rank's bytes between the two micro-batches of a second step, when moments and gradients exist."""
    before = _storages()  # left by earlier engines, and torch's own
    torch.manual_seed(0)
    engine = ZeroEngine(JiT(config.model, config.diffusion).train(), config, world)
    if engine.micro_batches != MICRO_BATCHES:
        raise UserError(f"{engine.micro_batches} micro-batches per step; the measurement takes {MICRO_BATCHES}")
    ema = ShardedEma(config.ema, engine.masters())
    z, t, y = torch.randn(1, *image_shape(config.model)), torch.rand(1), torch.zeros(1, dtype=torch.long)
    held: dict[int, int] = {}
    for step in range(2):
        for micro_batch in range(MICRO_BATCHES):
            engine.backward(engine(z, t, y).square().mean())
            if (step, micro_batch) == (1, 0):
                engine.release_memory()
                held = _storages()
            engine.step(1e-4 if micro_batch == MICRO_BATCHES - 1 else None)
        ema.update(engine.masters(), step + 1, (step, step + 1))
    engine.destroy()
    own = [size for address, size in held.items() if before.get(address) != size]
    # The buckets of DeepSpeed's stage 3 are counted separately: their size does not depend on the network.
    buckets = [size for size in own if size in (4 * BUCKET_ELEMENTS, 2 * BUCKET_ELEMENTS)]
    return {"state": sum(own) - sum(buckets), "buckets": sum(buckets)}


def _storages() -> dict[int, int]:
    """Address and bytes of every storage that a tensor of this process holds, gradients included."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    held = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in held if storage.nbytes() > 0}
