"""One cluster for all tests of this folder, and a tiny run to submit to it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from jitscale.data.packing import write_shards
from tests.slurm.cluster import SlurmCluster

ROOT = Path(__file__).parents[2]
STEPS, BATCH, SAVE_EVERY = 60, 12, 5
SIZES = (
    "model.image_size=16",
    "model.patch_size=4",
    "model.hidden_size=32",
    "model.depth=2",
    "model.num_heads=2",
    "model.bottleneck_dim=8",
    "model.in_context_len=4",
    "model.in_context_start=1",
    "model.num_classes=10",
)


@pytest.fixture(scope="session")
def cluster() -> Iterator[SlurmCluster]:
    with SlurmCluster(nodes=6, accounting=True) as cluster:
        yield cluster


class Runs:
    """Tiny runs on the cluster."""

    def __init__(self, folder: Path, cluster: SlurmCluster) -> None:
        self.folder, self.cluster = folder, cluster
        images = np.random.default_rng(0).integers(0, 256, (75, 16, 16, 3), np.uint8)
        write_shards(images, np.arange(75) % 10, folder / "shards", samples_per_shard=20)
        (folder / "logs").mkdir()

    def settings(self, run: str, *more: str) -> list[str]:
        """The words behind the script: small sizes, everything else as in the script's configuration."""
        return [
            *SIZES,
            f"data.shards={self.folder / 'shards'}",
            f"data.batch_size={BATCH}",
            "data.num_workers=0",
            "data.window=16",
            "optim.warmup_images=48",
            "engine.precision=fp32",
            "ema.decays=[0.9]",
            "evaluation.weights=ema_0.9",
            "evaluation.grid_every_images=0",
            "tracking.wandb=off",
            "tracking.log_every_steps=1",
            f"checkpoint.every_images={SAVE_EVERY * BATCH}",
            "checkpoint.keep_last=100",
            "run.max_images=null",
            f"run.max_steps={STEPS}",
            "run.hang_timeout=20",
            f"run.dir={self.folder / run}",
            *more,
        ]

    def submit(self, run: str, *settings: str, options: tuple[str, ...] = (), faults: str = "") -> str:
        """`sbatch slurm/train_jit_h.sh`, on two nodes with two tasks each; returns the job's id."""
        return self.cluster.sbatch(
            "--nodes=2",
            "--ntasks-per-node=2",
            "--gpus-per-node=2",
            "--cpus-per-task=1",
            f"--chdir={ROOT}",
            f"--output={self.folder / 'logs'}/{run}.log",
            "--time=10",
            "--signal=B:USR1@20",
            *options,
            "slurm/train_jit_h.sh",
            *self.settings(run, *settings),
            env=self.environment(faults),
        )

    def environment(self, faults: str = "") -> dict[str, str]:
        return {
            "JITSCALE_HOME": str(ROOT),
            "JITSCALE_PYTHON": sys.executable,
            "JITSCALE_CACHE": str(self.folder / "cache"),
            "JITSCALE_FAULTS": faults,
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            "OMP_NUM_THREADS": "1",
            "HOME": os.environ.get("HOME", "/root"),
        }

    def log(self, run: str) -> str:
        path = self.folder / "logs" / f"{run}.log"
        return path.read_text(errors="replace") if path.exists() else ""


@pytest.fixture(scope="session")
def runs(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("slurm"), cluster)
