"""Sum the storages of all tensors of a rank in mid-step, in every stage and precision; write bytes of each rank.

Usage: planner_memory.py RESULT.json [STAGE-PRECISION ...]
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch

from jitscale import parallel
from jitscale.config import Config, EmaConfig, EngineConfig, ModelConfig
from jitscale.model.jit import JiT
from jitscale.planner import BUCKET_ELEMENTS
from jitscale.training.ema import ShardedEma
from jitscale.training.engine import ZeroEngine

DECAYS = [0.9, 0.99]
MODEL = ModelConfig(
    image_size=16,
    patch_size=4,
    hidden_size=320,
    depth=4,
    num_heads=4,
    bottleneck_dim=32,
    in_context_len=4,
    in_context_start=1,
    num_classes=10,
)
SETTINGS = [(0, "fp32")] + [(stage, p) for stage in (1, 2, 3) for p in ("fp32", "autocast", "bf16")]
MICRO_BATCHES = 2


def storages() -> dict[int, int]:
    """Address and bytes of every storage that a tensor of this process holds, gradients included."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    held = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in held if storage.nbytes() > 0}


def measure(stage: int, precision: str, world: parallel.World) -> dict[str, int]:
    """Bytes held between the two micro-batches of a second step, when moments and gradients are there."""
    before = storages()  # of engines that are gone, and torch's own
    torch.manual_seed(0)
    config = Config(
        model=MODEL,
        engine=EngineConfig(zero_stage=stage, precision=precision, micro_batch_size=1),
        ema=EmaConfig(decays=DECAYS),
    )
    config.data.batch_size = MICRO_BATCHES * world.size
    engine = ZeroEngine(JiT(MODEL).train(), config, world)
    ema = ShardedEma(config.ema, engine.masters())
    z, t, y = torch.randn(1, 3, 16, 16), torch.rand(1), torch.zeros(1, dtype=torch.long)
    held: dict[int, int] = {}
    for step in range(2):
        for micro_batch in range(MICRO_BATCHES):
            engine.backward(engine(z, t, y).square().mean())
            if (step, micro_batch) == (1, 0):
                if stage == 3:
                    engine._engine.empty_partition_cache()
                held = storages()
            engine.step(1e-4 if micro_batch == MICRO_BATCHES - 1 else None)
        ema.update(engine.masters(), step + 1, (step, step + 1))
    engine.destroy()
    own = [size for address, size in held.items() if before.get(address) != size]
    # Stage 3 always holds its bucket for reductions, whose size does not depend on the network.
    buckets = [size for size in own if size in (4 * BUCKET_ELEMENTS, 2 * BUCKET_ELEMENTS)]
    return {"state": sum(own) - sum(buckets), "buckets": sum(buckets)}


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
    main()
