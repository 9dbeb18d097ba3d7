"""From one resolution to another: between jobs of other stages and ranks, and inside one run."""

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jitscale.checkpoints.format import Checkpoint, complete_checkpoints
from jitscale.checkpoints.upgrade import plan_upgrade
from jitscale.config import load_config
from jitscale.preparation.array_shards import write_shards
from jitscale.run_folder import is_complete
from jitscale.tracking import read_metrics
from tests.support.processes import run_ranks, start_ranks
from tests.support.runs import BATCH, STEPS, Job, same_state, wait_for_steps

HALF = STEPS // 2
STILL = ["model.attn_dropout=0", "model.proj_dropout=0", f"run.max_steps={HALF}"]
RESIZED = ["model.image_size=32", "model.patch_size=8", "diffusion.noise_scale=2.0"]
HIGH = [*RESIZED, "optim.lr_factor_patch_embedding=0.25"]
PROGRESSIVE = [*STILL, *RESIZED, "progressive.resolutions=[16]", f"progressive.images=[{HALF * BATCH}]"]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A run with shards of 32 px, which a network of 16 px reads at half the size."""
    found = Job(tmp_path_factory.mktemp("upgrade"))
    images = np.random.default_rng(0).integers(0, 256, (75, 32, 32, 3), np.uint8)
    write_shards(images, np.arange(75) % 10, found.folder / "large", samples_per_shard=20)
    found.folder.joinpath("config.yaml").write_text(
        found.folder.joinpath("config.yaml").read_text().replace("data: {", f"data: {{shards: {found.folder}/large, ")
    )
    return found


def train(job: Job, name: str, *overrides: str, world_size: int = 2) -> list[dict[str, Any]]:
    return job.train(name, f"data.shards={job.folder / 'large'}", *overrides, world_size=world_size)


def upgrade(job: Job, source: str, target: str, expect: int = 0) -> str:
    arguments = ["--checkpoint", str(job.folder / source), "--to", str(job.folder / "config.yaml")]
    output = ["--output", str(job.folder / target)]
    return run_ranks(1, "tools/upgrade_resolution.py", *arguments, *output, *STILL, *HIGH, expect=expect)


@pytest.fixture(scope="module")
def low(job: Job) -> list[dict[str, Any]]:
    return train(job, "low", *STILL)


def losses(metrics: list[dict[str, Any]]) -> list[float]:
    assert [line["step"] for line in metrics] == list(range(1, HALF + 1))
    return [line["loss"] for line in metrics]


def test_stage_3_on_three_ranks_is_upgraded_to_stage_1_on_two(job: Job, low: list[dict[str, Any]]) -> None:
    elsewhere = train(job, "low_3", *STILL, "engine.zero_stage=3", world_size=3)
    assert losses(elsewhere) == pytest.approx(losses(low), rel=1e-5)
    assert "self-check of ema_0.9" in upgrade(job, "low_3", "high_3")
    upgrade(job, "low", "high")
    first = Checkpoint(complete_checkpoints(job.folder / "high_3")[0])
    assert first.progress.optimizer_step == HALF, "the moments were kept"
    moved = train(job, "high_3", *STILL, *HIGH, "engine.zero_stage=1")
    assert losses(moved) == pytest.approx(losses(train(job, "high", *STILL, *HIGH)), rel=1e-5)


def test_one_progressive_run_equals_the_chain_of_jobs(job: Job, low: list[dict[str, Any]]) -> None:
    """A run that is stopped in its second stage resumes there."""
    if not (job.folder / "high").exists():
        upgrade(job, "low", "high")
        train(job, "high", *STILL, *HIGH)
    shards = f"data.shards={job.folder / 'large'}"
    ranks = start_ranks(2, *job.command("both", shards, *PROGRESSIVE))
    wait_for_steps(ranks, job.folder / "both", HALF // 3)
    ranks[1].send_signal(signal.SIGTERM)
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [75, 75], outputs
    assert "from 16 to 32 px" in outputs[0]
    assert not is_complete(job.folder / "both", "train")
    assert losses(train(job, "both", *PROGRESSIVE)) == losses(read_metrics(job.folder / "high"))
    assert is_complete(job.folder / "both", "train")
    last = f"checkpoints/step_{HALF:08d}"
    assert same_state(job.folder / "both" / last, job.folder / "high" / last)
    assert same_state(job.folder / "both/at_16px" / last, job.folder / "low" / last)
    assert load_config(job.folder / "both/at_16px/config.yaml").model.patch_size == 4


def test_a_progressive_run_of_asym_with_a_middle_layer_and_routing(job: Job) -> None:
    """The second stage continues with the lifted subspace, in every set and to the end."""
    beyond = ["diffusion.prediction=asym", "diffusion.rank=5", "model.middle_head=1"]
    beyond += ["model.route_share=0.5", "model.route_blocks=[1,2]"]
    metrics = train(job, "beyond", *PROGRESSIVE, *beyond)
    assert all(line["middle_loss"] > 0 for line in metrics)
    run = job.folder / "beyond"
    before, first, last = (
        Checkpoint(complete_checkpoints(folder)[number])
        for folder, number in ((run / "at_16px", -1), (run, 0), (run, -1))
    )
    assert [each.progress.step for each in (before, first, last)] == [HALF, 0, HALF]
    plan = plan_upgrade(before.config, first.config)
    for name in before.weight_sets:
        expected = plan.tensor("subspace", before.tensor(name, "subspace"))
        assert expected.shape == (192, 5)
        assert torch.equal(first.tensor(name, "subspace"), expected)
        assert torch.equal(last.tensor(name, "subspace"), expected)
    key = "middle_layer.linear.weight"
    assert torch.equal(first.tensor("ema_0.9", key), plan.tensor(key, before.tensor("ema_0.9", key)))
    assert not first.tensor("exp_avg", key).any()
    assert not torch.equal(last.tensor("model", key), first.tensor("model", key))


def test_a_later_stage_without_images_is_refused_at_the_start(job: Job) -> None:
    said = run_ranks(2, *job.command("small", *PROGRESSIVE), expect=2)
    assert "the manifest says 16 pixels per side, model.image_size is 32" in said
    assert not (job.folder / "small/at_16px").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system takes root")
def test_a_full_disk_during_the_upgrade(job: Job, low: list[dict[str, Any]]) -> None:
    folder: Path = job.folder / "full"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)], check=True)
    try:
        said = upgrade(job, "low", "full", expect=2)
        assert "error: " in said
        assert "make room" in said
        assert not list(folder.glob("checkpoints/step_*"))
    finally:
        subprocess.run(["umount", str(folder)], check=True)
