"""Injected faults, full disks and two runs in one folder, and how the run reacts to each."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from jitscale.checkpoints.format import Checkpoint, complete_checkpoints
from jitscale.tracking import read_metrics
from tests.support.forking import Process
from tests.support.processes import PROGRAMS, run_ranks, start_ranks
from tests.support.runs import BATCH, STEPS, Job, losses, same_state, wait_for_steps

STILL = ["model.attn_dropout=0", "model.proj_dropout=0"]
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def unbroken(job: Job) -> list[dict[str, Any]]:
    return job.train("unbroken")


def steps_of(run: Path) -> list[int]:
    return [int(folder.name.removeprefix("step_")) for folder in complete_checkpoints(run)]


def test_an_asynchronous_run_leaves_the_same_checkpoints(job: Job, unbroken: list[dict[str, Any]]) -> None:
    metrics = job.train("asynchronous", "checkpoint.asynchronous=true")
    assert losses(metrics) == losses(unbroken)
    assert steps_of(job.folder / "asynchronous") == steps_of(job.folder / "unbroken") == list(range(4, STEPS + 1, 4))
    for first, second in zip(
        complete_checkpoints(job.folder / "asynchronous"), complete_checkpoints(job.folder / "unbroken"), strict=True
    ):
        assert same_state(first, second)


def test_some_checkpoints_are_never_pruned(job: Job) -> None:
    job.train("kept", "checkpoint.keep_last=2", f"checkpoint.keep_every_images={10 * BATCH}", world_size=1)
    assert steps_of(job.folder / "kept") == [12, 20, 24]


def test_one_step_that_is_not_finite_is_skipped_everywhere(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JITSCALE_FAULTS", "nan:step=5:rank=1")
    metrics = job.train("one_nan")
    assert [line["skipped_steps"] for line in metrics] == [0] * 4 + [1] * (STEPS - 4)
    assert metrics[4]["loss"] is None
    assert all(line["loss"] is not None for line in metrics[5:])
    assert Checkpoint(complete_checkpoints(job.folder / "one_nan")[-1]).progress.optimizer_step == STEPS - 1


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=SLOW), pytest.param(3, marks=SLOW)])
def test_many_steps_that_are_not_finite_roll_back_and_skip_ahead(
    job: Job, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    """Steps 6, 7 and 8 are not finite: the run goes back to step 4 and continues with the data after step 8."""
    monkeypatch.setenv("JITSCALE_FAULTS", "nan:step=6:rank=0:times=3")
    name = f"rolled_back_{stage}"
    metrics = job.train(name, "run.rollback_after=3", f"engine.zero_stage={stage}")
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    assert [line["skipped_images"] for line in metrics] == [0] * 4 + [4 * BATCH] * (STEPS - 4)
    last = Checkpoint(complete_checkpoints(job.folder / name)[-1]).progress
    assert (last.images, last.skipped_images) == (STEPS * BATCH, 4 * BATCH)
    monkeypatch.delenv("JITSCALE_FAULTS")
    job.copy(name, f"{name}_resumed", steps=12)
    resumed = job.train(f"{name}_resumed", "run.rollback_after=3", f"engine.zero_stage={stage}")
    assert losses(resumed) == pytest.approx(losses(metrics), rel=1e-6), "a resume continues with the same data"


def test_the_number_of_rollbacks_is_limited(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JITSCALE_FAULTS", "nan:step=6:times=1000")
    said = run_ranks(2, *job.command("hopeless", "run.rollback_after=2", "run.max_rollbacks=2"), expect=2)
    assert re.search(r"error: step \d+: no finite gradient in 2 steps, and run.max_rollbacks=2 are used up", said)
    assert len(re.findall(r"rolled back to step \d+, skipping \d+ images", said)) == 2


def test_a_hung_rank_ends_the_job_and_leaves_stacks(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JITSCALE_FAULTS", "hang:step=3:rank=1")
    ranks = start_ranks(2, *job.command("hung", "run.hang_timeout=8"))
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert all(rank.returncode != 0 for rank in ranks), outputs
    stacks = (job.folder / "hung" / "stacks_rank_00001.txt").read_text()
    assert "Timeout" in stacks
    assert "in inject" in stacks
    assert not list((job.folder / "asynchronous").glob("stacks_*")), "a run that ends normally leaves no stacks"


def test_a_slow_rank_is_named(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JITSCALE_FAULTS", "slow:step=1:rank=2:times=100:seconds=0.3")
    settings = ["run.max_steps=6", "tracking.log_every_steps=3"]
    said = run_ranks(3, *job.command("slow", *settings, world_size=3))
    assert re.search(r"rank 2 is slow: 0\.[3-9]\d* s to its first collective", said), said


def test_a_second_run_in_the_same_folder_is_refused(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JITSCALE_FAULTS", "slow:step=1:times=1000:seconds=0.2")
    first = start_ranks(1, *job.command("shared"))
    while not (job.folder / "shared" / "metrics.jsonl").exists():
        assert first[0].poll() is None, first[0].communicate()[0]
        time.sleep(0.05)
    said = run_ranks(1, *job.command("shared"), expect=2)
    assert re.search(rf"error: {job.folder}/shared: process {first[0].pid} on \S+ is at work there, and two runs", said)
    first[0].send_signal(signal.SIGTERM)
    assert first[0].wait(timeout=60) == 75


def test_a_flipped_bit_in_a_checkpoint_is_refused(job: Job, unbroken: list[dict[str, Any]]) -> None:
    job.copy("unbroken", "flipped", steps=8)
    file = complete_checkpoints(job.folder / "flipped")[-1] / "rank_00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(bytes(content))
    said = run_ranks(2, *job.command("flipped"), expect=2)
    assert f"error: {file}: its content has changed since it was written" in said


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system takes root")
def test_a_full_disk_leaves_the_old_checkpoint(job: Job) -> None:
    """One checkpoint fits on the file system of 1.5 MB, a second one does not."""
    folder = job.folder / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(folder)], check=True)
    try:
        ranks = start_ranks(2, *job.command("small", "checkpoint.keep_last=2"))
        outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [2, 2], outputs
        assert "make room, the previous checkpoint stays; training goes on" in outputs[0]
        assert sum(line.startswith("error: ") for line in outputs[0].splitlines()) == 1
        kept = steps_of(folder)
        assert kept[0] == 4
        Checkpoint(complete_checkpoints(folder)[0]).verify()
        assert read_metrics(folder)[-1]["step"] >= 12
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@SLOW
def test_twenty_kills_at_random_moments(job: Job, unbroken: list[dict[str, Any]]) -> None:
    """Two ranks with dropout are killed at any moment, also during saves.

    Nothing is lost, and the final state is bit-equal to the unbroken run's.
    """
    name = "killed"
    for number in range(20):
        ranks = start_ranks(2, *job.command(name, "checkpoint.asynchronous=" + ("true" if number % 2 else "false")))
        metrics = job.folder / name / "metrics.jsonl"
        begun = time.monotonic()
        before = len(metrics.read_text().splitlines()) if metrics.exists() else 0
        while not metrics.exists() or len(metrics.read_text().splitlines()) in (0, before):
            if any(rank.poll() is not None for rank in ranks) or time.monotonic() - begun > 60:
                break
            time.sleep(0.001)
        time.sleep((number * 37 % 100) / 100 * 0.4)
        for rank in ranks[:: 1 if number % 3 else -1]:
            rank.kill()
        for rank in ranks:
            rank.communicate()
        if complete_checkpoints(job.folder / name)[-1:] == [job.folder / name / f"checkpoints/step_{STEPS:08d}"]:
            # The save was complete; start another one.
            shutil.rmtree(job.folder / name)
    assert losses(job.train(name)) == pytest.approx(losses(unbroken), rel=1e-6)
    last = f"checkpoints/step_{STEPS:08d}"
    assert same_state(job.folder / name / last, job.folder / "unbroken" / last)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        pytest.param("checkpointed", ["engine.activation_checkpointing=1"], marks=SLOW),
        ("every_second", ["engine.activation_checkpointing=2"]),
        pytest.param("checkpointed_3", ["engine.activation_checkpointing=1", "engine.zero_stage=3"], marks=SLOW),
        pytest.param("offloaded", ["engine.offload_optimizer=true"], marks=SLOW),
        pytest.param("near_weights", ["engine.hpz_group_size=2", "engine.zero_stage=3"], marks=SLOW),
        pytest.param("offloaded_3", ["engine.offload_optimizer=true", "engine.zero_stage=3"], marks=SLOW),
    ],
)
def test_saving_memory_changes_no_number(
    job: Job, unbroken: list[dict[str, Any]], name: str, overrides: list[str]
) -> None:
    """Recomputation draws dropout again, with the same result."""
    assert losses(job.train(name, *overrides)) == pytest.approx(losses(unbroken), rel=1e-5)


def test_a_failed_background_save_loses_only_that_checkpoint(
    job: Job, unbroken: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The background save fails on one rank, once in the middle and once just before the last save."""
    monkeypatch.setenv("JITSCALE_FAULTS", "unwritable:step=8:rank=1,unwritable:step=20:rank=1")
    metrics = job.train("failed_saves", "checkpoint.asynchronous=true")
    assert losses(metrics) == losses(unbroken)
    assert steps_of(job.folder / "failed_saves") == [4, 12, 16, STEPS]


def test_a_rollback_verifies_and_counts_bad_images_once(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """No checkpoint is saved in the middle of a streak: a rollback must land on finite gradients."""
    monkeypatch.setenv("JITSCALE_FAULTS", "nan:step=6:times=4")
    metrics = job.train("streak", "run.rollback_after=4", "run.max_steps=12", world_size=1)
    assert steps_of(job.folder / "streak") == [4, 8, 12], "step 8 is written after the rollback to step 4"
    assert [line["skipped_images"] for line in metrics][-1] == 5 * BATCH
    assert all(line["loss"] is not None for line in metrics)
    assert not any(line["loss_spike"] for line in metrics)


def started(job: Job, name: str, world_size: int, steps: int, *overrides: str) -> list[Process]:
    """The ranks of a run that has logged this many steps."""
    ranks = start_ranks(world_size, *job.command(name, *overrides, world_size=world_size))
    wait_for_steps(ranks, job.folder / name, steps)
    return ranks


def ended(ranks: list[Process], code: int) -> str:
    """The output of rank 0, after all ranks have ended with `code`."""
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [code] * len(ranks), outputs
    assert "Traceback" not in "".join(outputs)
    return outputs[0]


def test_ctrl_c_saves(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun and srun pass the signal on to every rank. The next start names the settings that differ."""
    monkeypatch.setenv("JITSCALE_FAULTS", "slow:step=1:times=1000:seconds=0.1")
    ranks = started(job, "ctrl_c", 2, 5)
    for rank in ranks:
        rank.send_signal(signal.SIGINT)
    said = ended(ranks, 130)
    (last,) = re.findall(r"stopped by Ctrl-C: saved at step (\d+); the same command goes on from there", said)
    assert steps_of(job.folder / "ctrl_c")[-1] == int(last) >= 5
    monkeypatch.delenv("JITSCALE_FAULTS")
    again = ["run.max_steps=3", "optim.lr=2e-3", "data.batch_size=6"]
    said = run_ranks(2, *job.command("ctrl_c", *again))
    changes = [line for line in said.splitlines() if line.startswith("since this checkpoint: ")]
    settings = ["data.batch_size 12 -> 6", "optim.lr 0.001 -> 0.002", "run.max_steps 24 -> 3"]
    assert changes == [f"since this checkpoint: {setting}" for setting in settings]
    assert f"run.max_steps=3 is below the {last} steps already done; nothing is left to train" in said


@SLOW
def test_a_failed_final_save_on_one_rank_asks_for_a_requeue(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """This holds if an older checkpoint exists. Without one, the user must act."""
    steps = ",".join(f"unwritable:step={step}:rank=1" for step in range(5, 24))
    monkeypatch.setenv("JITSCALE_FAULTS", f"{steps},slow:step=1:times=1000:seconds=0.2")
    for name, first, code in (("with_older", 4, 75), ("without_older", 24, 2)):
        ranks = started(job, name, 2, 5, f"checkpoint.every_images={first * BATCH}")
        ranks[0].send_signal(signal.SIGUSR1)
        said = ended(ranks, code)
        assert "cannot be written" in said
        assert ("saved at step 4;" in said) == (code == 75)
        assert steps_of(job.folder / name) == [4] * (code == 75)


@SLOW
def test_a_folder_that_disappears_is_written_again(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JITSCALE_FAULTS", "slow:step=1:times=1000:seconds=0.1")
    ranks = started(job, "gone", 2, 5)
    (job.folder / "gone").rename(job.folder / "moved")
    said = ended(ranks, 0)
    assert f"run.dir={job.folder}/gone: .lock and config.yaml and checkpoints/step_00000004 gone, removed or" in said
    assert steps_of(job.folder / "gone")[-1] == STEPS
    assert (job.folder / "gone/config.yaml").read_text() == (job.folder / "moved/config.yaml").read_text()
    assert read_metrics(job.folder / "gone")[-1]["step"] == STEPS


@SLOW
def test_failing_storage_on_one_rank_is_reported_by_that_rank(job: Job) -> None:
    program = [str(PROGRAMS / "failing_storage.py"), *job.command("eio")[2:]]
    ranks = start_ranks(2, *program)
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1], outputs
    assert re.fullmatch(r"rank 1: \S+shard-\d+.tar: byte .*Input/output error.*start again.*\n", outputs[1]), outputs[1]
    assert outputs[0].count("error: rank 0: ends because another rank has ended") == 1
    assert "Traceback" not in outputs[0]
