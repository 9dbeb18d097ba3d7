"""One cluster for all tests of this folder, and a tiny run to submit to it."""

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jitscale.checkpoints.format import complete_checkpoints
from jitscale.preparation.array_shards import write_shards
from jitscale.tracking import read_metrics
from tests.slurm.cluster import SlurmCluster
from tests.support import ROOT
from tests.support.processes import run_ranks
from tests.support.tiny import OVERRIDES

STEPS, BATCH, SAVE_EVERY = 60, 12, 5
STEADY = f"slow:step=1:times={STEPS}:seconds="  # Each step waits, so that there is time to disturb the run.
STILL = ("model.attn_dropout=0", "model.proj_dropout=0")


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
        """The words after the script: small sizes, and otherwise the script's configuration."""
        return [
            *OVERRIDES,
            f"data.shards={self.folder / 'shards'}",
            f"data.batch_size={BATCH}",
            "data.num_workers=0",
            "data.window=16",
            "optim.warmup_images=48",
            "engine.precision=fp32",
            "ema.decays=[0.9]",
            "evaluation.weights=ema_0.9",
            "evaluation.grid_every_images=0",
            "evaluation.every_images=0",
            "evaluation.at_end=false",
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

    def submit(
        self, run: str, *settings: str, options: tuple[str, ...] = (), faults: str = "", tasks_per_node: int = 1
    ) -> str:
        """`sbatch slurm/train_jit_h.sh` on two nodes; returns the job's id.

        Each rank is an interpreter that imports torch twice, for the preflight and for training. The machine has few
        cores for them, so the number of ranks determines the duration of these tests.
        """
        return self.cluster.sbatch(
            "--nodes=2",
            f"--ntasks-per-node={tasks_per_node}",
            f"--gpus-per-node={tasks_per_node}",
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


def without_slurm(runs: Runs, run: str, world_size: int) -> list[dict[str, Any]]:
    """The metrics of the same run on as many ranks, started by hand."""
    overrides = runs.settings(run, *STILL)
    run_ranks(world_size, "-m", "jitscale.train", "--config", str(ROOT / "configs/jit_h_256.yaml"), *overrides)
    return read_metrics(runs.folder / run)


@pytest.fixture(scope="session")
def unbroken(runs: Runs) -> list[dict[str, Any]]:
    """The same run on two ranks without Slurm."""
    return without_slurm(runs, "unbroken", 2)


@pytest.fixture(scope="session")
def time_limited(runs: Runs) -> tuple[str, float]:
    """A run that needs several time limits of two minutes. It is submitted first, because it takes the longest."""
    job = runs.submit("limited", *STILL, options=("--time=2",), faults=f"{STEADY}3.5")
    return job, time.monotonic()


def check(
    runs: Runs,
    run: str,
    job: str,
    unbroken: list[dict[str, Any]],
    restarts: int | None = None,
    seconds: float = 240,
) -> None:
    """The job is complete, and its losses equal those of the undisturbed run."""
    cluster = runs.cluster
    state = cluster.wait(job, seconds=seconds)
    log = runs.log(run)
    assert state == "COMPLETED", log[-4000:]
    assert json.loads((runs.folder / run / "complete_train.json").read_text())
    metrics = read_metrics(runs.folder / run)
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1)), "every step appears once"
    found, expected = [line["loss"] for line in metrics], [line["loss"] for line in unbroken]
    assert found == pytest.approx(expected, rel=1e-6)
    if restarts is not None:
        assert int(cluster.job(job)["Restarts"]) == restarts, log[-4000:]
    print(f"\n{run}: {cluster.job(job)['Restarts']} restarts")


def started(runs: Runs, run: str, steps: int = 8) -> None:
    """Wait until the run has trained some steps and saved a checkpoint."""

    def is_there() -> bool:
        path = runs.folder / run / "metrics.jsonl"
        return (
            path.exists()
            and len(path.read_text().splitlines()) >= steps
            and bool(complete_checkpoints(runs.folder / run))
        )

    runs.cluster.wait_for(is_there, 120, f"{run} has not begun: {runs.log(run)[-3000:]}")
