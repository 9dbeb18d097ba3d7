"""Averages, snapshots and tools/posthoc_ema.py on real runs: killed, moved to other ranks, reconstructed."""

import time
from pathlib import Path

import pytest
import torch

import jitscale
from jitscale.checkpoints.format import MARKER, Checkpoint, complete_checkpoints
from jitscale.checkpoints.opening import open_weights
from jitscale.checkpoints.saving import complete_snapshots
from jitscale.tracking import read_metrics
from tests.distributed.programs.zero_parity import largest_difference
from tests.support import ROOT
from tests.support.forking import Process
from tests.support.processes import start_ranks
from tests.support.runs import BATCH, STEPS, Job, losses

# Dropout is off, because it is drawn by rank. A step that crosses a multiple of 27 images makes a snapshot.
SETTINGS = [
    "model.attn_dropout=0",
    "model.proj_dropout=0",
    "ema.decays=[0.9]",
    "ema.warmup=true",
    "ema.power_widths=[0.05,0.1]",
    f"ema.snapshot_every_images={2 * BATCH + 3}",
    "evaluation.weights=power_0.100",
    "tracking.log_every_steps=1",
]
POINTS = [36, 60, 84, 108, 144, 168, 192, 216, 252, 276, 288]  # in images; the last one is the end of the run
GAMMAS = {"power_0.050": 16.972199, "power_0.100": 6.937204}  # arXiv 2312.02696


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(tmp_path_factory.mktemp("posthoc"))


@pytest.fixture(scope="module")
def run(job: Job) -> Path:
    """An uninterrupted run of two ranks that saves every step."""
    job.train("whole", *SETTINGS, f"checkpoint.every_images={BATCH}")
    return job.folder / "whole"


def reconstruct(run: Path, *options: str, expect: int = 0) -> str:
    """Run the tool; returns its output."""
    process = Process(["tools/posthoc_ema.py", "--run", str(run), *options], env={"PYTHONPATH": str(ROOT), "PATH": ""})
    said, _ = process.communicate(timeout=60)
    assert process.returncode == expect, said
    return said


def state(folder: Path, name: str) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(folder)
    return {parameter: checkpoint.tensor(name, parameter) for parameter in checkpoint.shapes}


def test_sharded_averages_equal_plain_averages(run: Path) -> None:
    """The averages are recomputed in float64 from the master weights of every step's checkpoint. Warm-up is on."""
    folders = complete_checkpoints(run)
    assert len(folders) == STEPS
    plain: dict[str, dict[str, torch.Tensor]] = {"power_0.050": {}, "power_0.100": {}}
    initial = {name: torch.zeros_like(t).double() for name, t in state(folders[0], "model").items()}
    last = [state(folder, "model") for folder in folders]
    for set_name, gamma in GAMMAS.items():
        average = dict(initial)
        for step, weights in enumerate(last, 1):
            beta = (1 - 1 / step) ** (gamma + 1)
            average = {name: beta * average[name] + (1 - beta) * weights[name].double() for name in average}
        plain[set_name] = {name: t.float() for name, t in average.items()}
        assert largest_difference(state(folders[-1], set_name), plain[set_name]) < 1e-6
    # The average of the decay contains the unknown initial weights at step 1, so it is followed from there.
    average = {name: t.double() for name, t in state(folders[0], "ema_0.9").items()}
    for step, weights in enumerate(last[1:], 2):
        decay = min(0.9, (1 + step) / (10 + step))
        average = {name: decay * average[name] + (1 - decay) * weights[name].double() for name in average}
    assert largest_difference(state(folders[-1], "ema_0.9"), {n: t.float() for n, t in average.items()}) < 1e-6


def test_snapshots_equal_the_averages_of_the_same_step(run: Path) -> None:
    """A snapshot holds the power averages only, in float32, bit-equal to the checkpoint of the same step.

    Snapshots are made at the multiples and at the end.
    """
    snapshots = complete_snapshots(run)
    assert list(snapshots) == POINTS
    for images, folder in snapshots.items():
        snapshot = Checkpoint(folder)
        assert snapshot.sets == ["power_0.050", "power_0.100"]
        checkpoint = run / f"checkpoints/step_{images // BATCH:08d}"
        for name in snapshot.sets:
            assert largest_difference(state(folder, name), state(checkpoint, name)) == 0.0
        # The snapshot is written first: a kill between both must not lose it, because a resume does not write snapshots
        # before its checkpoint again.
        assert (folder / MARKER).stat().st_mtime_ns < (checkpoint / MARKER).stat().st_mtime_ns
    model = jitscale.load_model(run)
    expected = state(complete_checkpoints(run)[-1], "power_0.100")
    assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters()), "evaluation.weights"


@pytest.mark.slow
def test_a_killed_run_that_resumes_elsewhere_has_the_same_snapshots(job: Job, run: Path) -> None:
    """Two ranks are killed anywhere after the first snapshots; some snapshots lie after the last checkpoint.

    Three ranks resume.
    """
    name = "killed"
    ranks = start_ranks(2, *job.command(name, *SETTINGS, f"checkpoint.every_images={7 * BATCH}"))
    try:
        while len(complete_snapshots(job.folder / name)) < 5:
            assert all(rank.poll() is None for rank in ranks), ranks[0].communicate()[0]
            time.sleep(0.002)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    written = complete_snapshots(job.folder / name)
    assert len(written) < len(POINTS), "the kill came too late to prove anything"
    checkpoint = Checkpoint(complete_checkpoints(job.folder / name)[-1]).progress.images
    assert max(written) > checkpoint, "a snapshot must lie after the last checkpoint"
    moved = job.train(name, *SETTINGS, "engine.zero_stage=3", world_size=3)
    assert losses(moved) == pytest.approx(losses(read_metrics(run)), rel=1e-5)
    found = complete_snapshots(job.folder / name)
    assert list(found) == POINTS
    assert len(list((job.folder / name / "snapshots").iterdir())) == len(POINTS), "no other snapshot is left"
    for images, folder in complete_snapshots(run).items():
        ours, theirs = Checkpoint(found[images]), Checkpoint(folder)
        assert ours.progress == theirs.progress
        assert len(list(found[images].glob("rank_*"))) == (2 if images <= checkpoint else 3), (
            "the snapshot was written again"
        )
        for set_name in theirs.sets:
            assert largest_difference(state(found[images], set_name), state(folder, set_name)) < 1e-5


def test_another_batch_size_removes_snapshots_after_the_checkpoint(job: Job, run: Path) -> None:
    """From step 12 on the batch is twice as large.

    There are new snapshot points, and no old ones after the checkpoint.
    """
    job.copy("whole", "bigger", steps=12)
    twice = [f"data.batch_size={2 * BATCH}", f"run.max_images={STEPS * BATCH}", "run.max_steps=100"]
    job.train("bigger", *SETTINGS, *twice, "engine.zero_stage=2", world_size=1)
    assert list(complete_snapshots(job.folder / "bigger")) == [36, 60, 84, 108, 144, 168, 192, 216, 264, 288]


def test_the_tool_reconstructs_the_tracked_averages(run: Path, tmp_path: Path) -> None:
    """Widths in between are reconstructed too. The files are read as weights, without a config next to them."""
    printed = reconstruct(run, "--widths", "0.05", "0.075:0.1:0.025", "--output", str(tmp_path / "end"))
    assert "11 snapshots of 36 to 288 images" in printed
    assert sorted(f.name for f in (tmp_path / "end").iterdir()) == [
        "power_0.050.safetensors",
        "power_0.075.safetensors",
        "power_0.100.safetensors",
    ]
    last = complete_checkpoints(run)[-1]
    for name in GAMMAS:
        made = open_weights(tmp_path / "end" / f"{name}.safetensors")
        assert made.weight_sets == [name]
        assert largest_difference(made.network().state_dict(), state(last, name)) < 1e-5
    between = jitscale.load_model(tmp_path / "end" / "power_0.075.safetensors")
    gamma, average = 10.289116, {n: torch.zeros_like(t).double() for n, t in state(last, "model").items()}
    for step, folder in enumerate(complete_checkpoints(run), 1):
        beta = (1 - 1 / step) ** (gamma + 1)
        average = {n: beta * average[n] + (1 - beta) * t.double() for n, t in state(folder, "model").items()}
    tracked = {n: t.float() for n, t in average.items()}
    error = largest_difference({n: p.detach() for n, p in between.named_parameters()}, tracked)
    assert error < 1e-4
    nearest = min(largest_difference(state(last, name), tracked) for name in GAMMAS)
    assert error < nearest / 30, "the widths must differ for this to mean anything"


def test_the_tool_reconstructs_earlier_steps_and_refuses_in_one_line(run: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    reconstruct(run, "--widths", "0.1", "--at-images", "144", "--output", str(half))
    made = open_weights(half / "power_0.100.safetensors").network().state_dict()
    assert largest_difference(made, state(run / "checkpoints/step_00000012", "power_0.100")) < 1e-5
    for options, expected in (
        (["--widths", "0.1", "--output", str(half)], "power_0.100.safetensors: exists already"),
        (["--widths", "0.5", "--output", str(half)], "0.5 is no width of a power function"),
        (["--widths", "0.1", "--at-images", "36", "--output", str(tmp_path)], "1 snapshot up to 36 images"),
    ):
        said = reconstruct(run, *options, expect=2).splitlines()
        assert [line for line in said if line.startswith("error: ") and expected in line] == said
    assert [f.name for f in half.iterdir()] == ["power_0.100.safetensors"]
