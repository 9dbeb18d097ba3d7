"""All four additions to the paper's method at once, in real processes: resumes, other worlds and stages, the end."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import jitscale
from jitscale.checkpoints.format import Checkpoint
from tests.support.runs import BATCH, STEPS, Job, losses, same_state
from tests.support.tools import run_tool

# Dropout is off, because it is drawn by rank. Class tokens enter inside the route, and the middle layer lies inside it.
ALL_FOUR = (
    *("model.depth=5", "model.in_context_start=2", "model.attn_dropout=0", "model.proj_dropout=0"),
    *("diffusion.prediction=asym", "diffusion.rank=5"),
    *("model.middle_head=3", "evaluation.internal_guidance=1.5"),
    *("model.route_share=0.5", "model.route_blocks=[1,-1]", f"run.route_until_images={20 * BATCH}"),
    *("evaluation.method=ab2", "evaluation.time_shift=1.5", "evaluation.steps=4", "evaluation.guidance_scale=1.5"),
    *("ema.power_widths=[0.1,0.2]", f"ema.snapshot_every_images={6 * BATCH}"),
)
MEASURED = ("evaluation.at_end=true", "evaluation.features=digits", "evaluation.num_images=10")
HALF = STEPS // 2


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(tmp_path_factory.mktemp("additions"))


@pytest.fixture(scope="module")
def unbroken(job: Job) -> list[dict[str, Any]]:
    return job.train("unbroken", *ALL_FOUR, *MEASURED)


def last(job: Job, run: str) -> Path:
    return job.folder / run / f"checkpoints/step_{STEPS:08d}"


def test_both_losses_are_recorded(unbroken: list[dict[str, Any]]) -> None:
    assert all(0 < line["middle_loss"] < 10 for line in unbroken if "loss" in line)


def test_a_resume_in_the_middle_equals_the_unbroken_run(job: Job, unbroken: list[dict[str, Any]]) -> None:
    job.copy("unbroken", "resumed", steps=HALF)
    (job.folder / "resumed/result.json").unlink()
    resumed = job.train("resumed", *ALL_FOUR, *MEASURED)
    assert losses(resumed) == losses(unbroken)
    assert same_state(last(job, "resumed"), last(job, "unbroken"))
    ends = [json.loads((job.folder / run / "result.json").read_text()) for run in ("unbroken", "resumed")]
    assert ends[0]["fid"] == ends[1]["fid"]


@pytest.mark.parametrize(
    ("world_size", "more"),
    [
        (3, ["engine.zero_stage=3", *MEASURED]),
        (1, ["engine.zero_stage=0"]),
        (2, ["engine.zero_stage=2", "engine.activation_checkpointing=2", "engine.align=true"]),
    ],
)
def test_a_resume_in_another_world_and_stage(
    job: Job, unbroken: list[dict[str, Any]], world_size: int, more: list[str]
) -> None:
    name = f"elsewhere_{world_size}"
    job.copy("unbroken", name, steps=HALF)
    moved = job.train(name, *ALL_FOUR, *more, world_size=world_size)
    assert losses(moved) == pytest.approx(losses(unbroken), rel=1e-5)
    middle = [[line["middle_loss"] for line in run if "middle_loss" in line] for run in (moved, unbroken)]
    assert middle[0] == pytest.approx(middle[1], rel=1e-5)
    if "evaluation.at_end=true" in more:
        ends = [json.loads((job.folder / run / "result.json").read_text())["fid"] for run in ("unbroken", name)]
        assert ends[1] == pytest.approx(ends[0], rel=1e-3)
    # The subspace is not trained: every set holds it, and nothing may change it.
    before, after = Checkpoint(last(job, "unbroken")), Checkpoint(last(job, name))
    for weights in after.weight_sets:
        assert torch.equal(after.tensor(weights, "subspace"), before.tensor("model", "subspace"))


@pytest.mark.usefixtures("unbroken")
def test_post_hoc_averages_have_both_layers_and_the_subspace(job: Job) -> None:
    done = run_tool("posthoc_ema", "--run", job.folder / "unbroken", "--widths", 0.15, "--output", job.folder / "mixed")
    assert done.code == 0, done.err
    mixed = jitscale.load_model(job.folder / "mixed/power_0.150.safetensors")
    end = Checkpoint(last(job, "unbroken"))
    assert mixed.subspace is not None
    assert torch.equal(mixed.subspace, end.tensor("model", "subspace"))
    for name, found in mixed.state_dict().items():
        if name.startswith(("final_layer", "middle_layer")):
            weights = end.tensor("model", name)
            assert 0 < float((found - weights).norm()) < float(weights.norm()), name
    images = jitscale.sample(mixed, [1, 2], steps=3, method="ab2", internal_guidance=1.5)
    assert images.isfinite().all()


def test_routing_ends_at_the_configured_image(job: Job, unbroken: list[dict[str, Any]]) -> None:
    """After that image, the run behaves like a run without routing."""
    job.copy("unbroken", "unrouted", steps=20)
    unrouted = job.train("unrouted", *ALL_FOUR, "model.route_share=0")
    assert losses(unrouted) == losses(unbroken)
    job.copy("unbroken", "routed", steps=20)
    routed = job.train("routed", *ALL_FOUR, "run.route_until_images=null")
    assert losses(routed)[:20] == losses(unbroken)[:20]
    assert losses(routed)[20] != losses(unbroken)[20]
