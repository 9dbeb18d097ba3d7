"""`sbatch slurm/train_jit_h.sh` on a real Slurm: whatever happens to the job, it ends with the same losses."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import SlurmCluster
from tests.slurm.conftest import SAVE_EVERY, STEADY, STILL, Runs, check, started, without_slurm
from tests.support import ROOT

pytestmark = pytest.mark.cluster

RANK = r"jitscale\.train "


def other_node(runs: Runs, run: str, job: str) -> str:
    """The node of the run that does not run its batch script."""
    host = runs.cluster.job(job)["BatchHost"]
    return next(node for node in runs.cluster.nodes if node != host and runs.cluster.tasks(node, rf"{RANK}.*{run}"))


def test_a_run_to_its_end(runs: Runs, time_limited: tuple[str, float]) -> None:
    """There are two tasks on each node; the other tests have one."""
    job = runs.submit("whole", *STILL, tasks_per_node=2)
    check(runs, "whole", job, without_slurm(runs, "unbroken_on_four", 4), restarts=0)
    log = runs.log("whole")
    assert "preflight: 4 ranks on 2 nodes are fit" in log
    assert "MASTER_PORT=" in log
    assert "whole is complete" in log


def test_a_broken_node_is_named_and_avoided(runs: Runs, unbroken: list[dict[str, Any]]) -> None:
    cluster = runs.cluster
    nodes = ("jsnode5", "jsnode6")
    with cluster.unwritable_scratch("jsnode6"):
        job = runs.submit(
            "broken_node", *STILL, f"data.cache_dir={cluster.scratch}", options=(f"--nodelist={','.join(nodes)}",)
        )
        cluster.wait_for(lambda: "excluded: jsnode6" in runs.log("broken_node"), 90, "no node was excluded")
        # The node was requested by name, so the job could not go elsewhere.
        cluster.wait_for(lambda: cluster.job(job)["JobState"] == "PENDING", 30, "not back in the queue")
        assert cluster.job(job)["ExcNodeList"] == "jsnode6"
        cluster.run("scontrol", "update", f"JobId={job}", "ReqNodeList=")
        check(runs, "broken_node", job, unbroken, restarts=1)
    assert "preflight: node jsnode6:" in runs.log("broken_node")
    assert "Read-only file system" in runs.log("broken_node")


def test_a_rank_that_is_killed_and_one_that_hangs(runs: Runs, unbroken: list[dict[str, Any]]) -> None:
    signals = {"killed_rank": signal.SIGKILL, "hanging_rank": signal.SIGSTOP}
    jobs = {run: runs.submit(run, *STILL, faults=f"{STEADY}0.3") for run in signals}
    nodes, begun = {}, {}
    for run, number in signals.items():
        started(runs, run)
        nodes[run] = other_node(runs, run, jobs[run])
        begun[run] = time.monotonic()
        os.kill(runs.cluster.tasks(nodes[run], rf"{RANK}.*{run}")[0], number)
    for run, job in jobs.items():
        check(runs, run, job, unbroken, restarts=1)
        print(f"{run}: complete {time.monotonic() - begun[run]:.0f} s later")
    assert f"excluded: {nodes['killed_rank']}" in runs.log("killed_rank")


def test_preemption_requeue_and_signals(runs: Runs, unbroken: list[dict[str, Any]]) -> None:
    """The user's signal, Slurm's requeue, and a preemption by a job of a higher partition, one after another."""
    cluster = runs.cluster
    job = runs.submit("asked", *STILL, faults=f"{STEADY}0.5")
    for number, ask in enumerate(
        (
            lambda: cluster.run("scancel", "--batch", "--signal=USR1", job),
            lambda: cluster.run("scontrol", "requeue", job),
            lambda: preempt(runs, cluster.job(job)["NodeList"]),
        )
    ):
        started(runs, "asked", steps=8 + 8 * number)
        ask()
        cluster.wait_for(
            lambda expected=number + 1: int(cluster.job(job)["Restarts"]) == expected,  # type: ignore[misc]
            60,
            f"restart {number + 1} has not come",
        )
    check(runs, "asked", job, unbroken)


def preempt(runs: Runs, nodes: str) -> None:
    urgent = runs.cluster.sbatch(
        "--partition=urgent", "--nodes=2", "--exclusive", f"--nodelist={nodes}", "--time=1", "--wrap=sleep 3",
        f"--output={runs.folder}/logs/urgent.log",
    )  # fmt: skip
    assert runs.cluster.wait(urgent, seconds=90) == "COMPLETED"


def test_a_node_that_dies_and_a_cable_that_is_pulled(runs: Runs, unbroken: list[dict[str, Any]]) -> None:
    """Two runs are tested at once, because most of the time passes until Slurm notices the failure."""
    cluster = runs.cluster
    apart = ("--cpus-per-task=3",)  # Two tasks with so many cores do not fit on one node.
    jobs = {run: runs.submit(run, *STILL, faults=f"{STEADY}0.3", options=apart) for run in ("dead_node", "no_cable")}
    for run in jobs:
        started(runs, run)
    dead, cut_off = cluster.job(jobs["dead_node"])["BatchHost"], other_node(runs, "no_cable", jobs["no_cable"])
    begun = time.monotonic()
    cluster.kill_node(dead)
    try:
        with cluster.unplugged(cut_off):
            for run, job in jobs.items():
                check(runs, run, job, unbroken)
                print(f"{run}: complete {time.monotonic() - begun:.0f} s later")
    finally:
        cluster.start_node(dead)
    for node in (dead, cut_off):
        cluster.wait_for(lambda node=node: cluster.node_states()[node] == "idle", 90, f"{node} is not back")  # type: ignore[misc]


def test_mistakes_end_the_job_with_one_line(runs: Runs, cluster: SlurmCluster) -> None:
    """These jobs are not started again."""
    jobs = {
        "optim.leraning_rate=1 is not a setting": runs.submit("mistake_1", "optim.leraning_rate=1"),
        "absent": runs.submit("mistake_2", f"data.shards={runs.folder / 'absent'}"),
    }
    for number, (message, job) in enumerate(jobs.items(), 1):
        assert cluster.wait(job) == "FAILED"
        log = runs.log(f"mistake_{number}")
        assert message in log
        assert "Traceback" not in log
        assert cluster.job(job)["ExitCode"] == "2:0"
        assert cluster.job(job)["Restarts"] == "0"
    refused = cluster.run("sbatch", "--partition=absent", "--parsable", str(ROOT / "slurm/train_jit_h.sh"), check=False)
    assert "invalid partition" in refused


def test_starts_without_progress_are_limited(runs: Runs, cluster: SlurmCluster) -> None:
    job = runs.submit(
        "nowhere", f"checkpoint.every_images={10**6}", faults=f"kill:step={SAVE_EVERY}:rank=0",
        options=("--export=ALL,JITSCALE_MOST_RETRIES=1",),
    )  # fmt: skip
    assert cluster.wait(job, seconds=150) == "FAILED"
    assert "1 starts in a row brought no progress beyond 0 (train ended with code" in runs.log("nowhere")


def test_nothing_is_left_behind() -> None:
    assert not Path("/etc/slurm/slurm.conf").exists()
