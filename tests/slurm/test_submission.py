"""tools/submit.py on a real Slurm: a chain, a sweep, and a stage that fails."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jitscale.checkpoints.format import Checkpoint, complete_checkpoints
from jitscale.tracking import read_metrics
from tests.slurm.conftest import Runs
from tests.support import ROOT
from tests.support.runs import write_chain_inputs

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def folder(runs: Runs) -> Path:
    folder = runs.folder / "submitted"
    folder.mkdir()
    write_chain_inputs(folder, samples=20, steps=6)
    return folder


def submit(runs: Runs, folder: Path, run: str, *more: str, tasks_per_node: int = 1) -> list[str]:
    """Submit jobs; returns their ids in order."""
    before = {path.name for path in (folder / "submissions/jobs").glob("*.json")}
    tool(
        runs,
        f"--config={folder / 'tiny_16.yaml'}",
        f"--run-dir={folder / run}",
        f"--folder={folder / 'submissions'}",
        "--nodes=2",
        f"--tasks-per-node={tasks_per_node}",
        "--cpus-per-task=1",
        "--minutes=10",
        "--sbatch=mem-per-cpu=800",
        *more,
    )
    new = [path for path in (folder / "submissions/jobs").glob("*.json") if path.name not in before]
    made = sorted((json.loads(path.read_text()) for path in new), key=lambda record: record["submitted"])
    return [record["job"] for record in made]


def tool(runs: Runs, *arguments: str, expect: int = 0) -> str:
    environment = {**runs.cluster.environment, **runs.environment()}
    finished = subprocess.run(
        [sys.executable, "tools/submit.py", *arguments],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == expect, finished.stdout + finished.stderr
    return finished.stdout + finished.stderr


def shards(folder: Path) -> list[str]:
    return [word for size in (16, 32) for word in ("--set", f"{size}/data.shards={folder / f'shards_{size}'}")]


def test_a_chain_a_sweep_and_a_failure(runs: Runs, folder: Path) -> None:
    """All jobs are submitted at once, and checked after their end."""
    cluster = runs.cluster
    chain = submit(runs, folder, "chain_16", "--chain=train:16,upgrade:32,train:32,evaluate", *shards(folder))
    rates = ["--set", "optim.lr=1e-3,2e-3", f"data.shards={folder / 'shards_16'}"]
    sweep = submit(runs, folder, "sweep", *rates, tasks_per_node=2)
    failing = submit(runs, folder, "gone_16", "--chain=train:16,upgrade:32,train:32", *shards(folder))
    (folder / "gone_32").write_text("")  # This file blocks the upgrade's output. submit itself would refuse it.
    assert [len(chain), len(sweep), len(failing)] == [4, 2, 3]

    states = {job: cluster.wait(job, seconds=400) for job in (*chain, *sweep, *failing)}
    table = tool(runs, "status", f"--folder={folder / 'submissions'}")
    logs = "\n".join(path.read_text(errors="replace")[-1500:] for path in (folder / "submissions").glob("*_log.out"))
    assert [states[job] for job in chain] == ["COMPLETED"] * 4, logs
    assert Checkpoint(complete_checkpoints(folder / "chain_32")[-1]).progress.step == 6
    assert np.isfinite(json.loads((folder / "chain_32/result.json").read_text())["fid"])

    assert [states[job] for job in sweep] == ["COMPLETED"] * 2, logs
    trained = [read_metrics(folder / f"sweep_optim.lr={rate}")[-1]["lr"] for rate in ("1e-3", "2e-3")]
    assert trained == [1e-3, 2e-3]

    assert [states[job] for job in failing] == ["COMPLETED", "FAILED", "CANCELLED"], logs
    assert f"upgrade gone_32 (job {failing[1]}) did not succeed" in table
    assert "gone_32" in table
    print(io.StringIO(table).getvalue())


def test_mistakes_are_not_queued(runs: Runs, folder: Path) -> None:
    common = [f"--config={folder / 'tiny_16.yaml'}", f"--folder={folder / 'none'}", f"--run-dir={folder / 'none'}"]
    here = f"data.shards={folder / 'shards_16'}"
    for words, message in (
        (["--partition=absent", here], "--partition absent: not on this cluster; choose one of batch, urgent"),
        (["data.shards=absent"], "absent"),
        (["optim.lr=fast", here], "optim.lr=fast has the wrong type"),
    ):
        assert message in tool(runs, *common, "--tasks-per-node=2", *words, expect=2)
    assert not os.path.exists(folder / "none")
