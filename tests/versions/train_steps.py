"""Train a few steps on the CPU, in the ways that depend on the version of PyTorch: python train_steps.py [WAY ...]

Each way prints one line. Exit code 1: a way failed. tests/versions/run.sh runs it in environments of several versions.
"""

import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from jitscale.preparation.array_shards import write_shards

ROOT = Path(__file__).parents[2]
TRAIN = ["-m", "jitscale.train", "--config", str(ROOT / "configs/digits_32.yaml")]
TWO_RANKS = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
SHORT = ["run.max_images=null", "run.max_steps=3", "data.batch_size=8", "tracking.log_every_steps=1"]
SHORT += [
    "tracking.wandb=off",
    "checkpoint.every_images=8",
    "evaluation.at_end=false",
    "evaluation.grid_every_images=8",
]
SHORT += ["evaluation.steps=2"]
# JiT-H and JiT-G train like this when memory is short: compiled blocks, of which some are recomputed.
COMPILED = ["engine.compile=true", "engine.align=true", "engine.precision=autocast", "model.depth=2"]
COMPILED += ["engine.activation_checkpointing=1", "model.attn_dropout=0.2", "model.proj_dropout=0.2"]
COMPILED += ["evaluation.grid_every_images=0"]  # Sampling has graphs of its own, which take minutes more.
# Name -> launcher and settings. `resumed` continues in the folder of `plain`.
WAYS: dict[str, tuple[list[str], list[str]]] = {
    "plain": ([], []),
    "resumed": ([], ["run.max_steps=5", "engine.zero_stage=2"]),
    "two_ranks": (TWO_RANKS, ["engine.zero_stage=3", "engine.precision=autocast"]),
    "muon": ([], ["optim.name=muon"]),
    "compiled": ([], COMPILED),
}


def main() -> int:
    """Train in every way; returns the exit code."""
    print(f"Python {platform.python_version()}, torch {torch.__version__}", flush=True)
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        pixels = np.random.default_rng(0).integers(256, size=(64, 32, 32, 3), dtype=np.uint8)
        write_shards(list(pixels), [number % 10 for number in range(64)], Path(scratch) / "shards", codec="raw")
        for name in sys.argv[1:] or WAYS:
            launcher, settings = WAYS[name]
            run = Path(scratch) / name.replace("resumed", "plain")
            places = [f"data.shards={scratch}/shards", f"run.dir={run}"]
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            started = time.monotonic()
            finished = subprocess.run(
                [sys.executable, *launcher, *TRAIN, *SHORT, *settings, *places],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
            losses = _losses(run)
            right = finished.returncode == 0 and len(losses) >= 3 and all(math.isfinite(loss) for loss in losses)
            failed += not right
            print(f"{'ok  ' if right else 'FAIL'} {name}: {len(losses)} steps, {time.monotonic() - started:.0f} s")
            if not right:
                print(f"exit code {finished.returncode}, losses {losses}\n{finished.stdout[-2500:]}")
            sys.stdout.flush()
    return 1 if failed else 0


def _losses(run: Path) -> list[float]:
    """The loss of every logged step."""
    if not (run / "metrics.jsonl").exists():
        return []
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


if __name__ == "__main__":
    sys.exit(main())
