"""Runs with asym in real processes: the subspace in checkpoints, averages, exports and later starts."""

import json
from pathlib import Path

import pytest
import torch

import jitscale
from jitscale.checkpoints.format import Checkpoint, complete_checkpoints
from jitscale.checkpoints.opening import open_weights
from jitscale.checkpoints.saving import complete_snapshots
from jitscale.checkpoints.weights import MOMENTS, names_in
from jitscale.config import load_config
from jitscale.tracking import read_metrics
from jitscale.training.subspace import random_subspace, read_subspace, write_subspace
from tests.support.processes import run_ranks
from tests.support.runs import BATCH, STEPS, Job, losses
from tests.support.tools import run_tool

RANK = 5
SETTINGS = [
    "diffusion.prediction=asym",
    f"diffusion.rank={RANK}",
    "model.attn_dropout=0",
    "model.proj_dropout=0",
    "ema.power_widths=[0.1,0.2]",
    f"ema.snapshot_every_images={6 * BATCH}",
    "data.held_out=0.2",
    f"evaluation.held_out_every_images={12 * BATCH}",
    f"evaluation.grid_every_images={STEPS * BATCH}",
    "evaluation.steps=2",
]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(tmp_path_factory.mktemp("asym"))


@pytest.fixture(scope="module")
def whole(job: Job) -> Path:
    """An uninterrupted run of two ranks in stage 1."""
    job.train("whole", *SETTINGS)
    return job.folder / "whole"


def kept(job: Job) -> Path:
    """The file that the first run wrote next to the shards."""
    (file,) = (job.folder / "shards/real_images").glob("subspace_*.safetensors")
    return file


def subspace(job: Job) -> torch.Tensor:
    config = load_config(job.folder / "whole/config.yaml")
    return read_subspace(kept(job), config.model, config.diffusion)


def last(run: Path) -> Checkpoint:
    return Checkpoint(complete_checkpoints(run)[-1])


def holds_it(checkpoint: Checkpoint, expected: torch.Tensor) -> bool:
    return all(torch.equal(checkpoint.tensor(name, "subspace"), expected) for name in checkpoint.weight_sets)


def test_every_weight_set_holds_it_and_no_moment(job: Job, whole: Path) -> None:
    checkpoint, expected = last(whole), subspace(job)
    assert checkpoint.weight_sets == ["model", "ema_0.9", "ema_0.99", "power_0.100", "power_0.200"]
    assert holds_it(checkpoint, expected)
    assert set(checkpoint.sets) > set(MOMENTS)
    assert [name for name in checkpoint.shapes if name not in names_in("exp_avg", checkpoint.shapes)] == ["subspace"]
    for name in MOMENTS:
        with pytest.raises(jitscale.errors.CheckpointError, match=f"{name}:subspace:0"):
            checkpoint.tensor(name, "subspace")
    assert len(complete_snapshots(whole)) == STEPS // 6
    for folder in complete_snapshots(whole).values():
        assert holds_it(Checkpoint(folder), expected)
    assert checkpoint.tensor("model", "x_embedder.proj1.weight").isfinite().all()


def test_all_weights_except_the_subspace_are_trained(job: Job, whole: Path) -> None:
    first, end = (Checkpoint(complete_checkpoints(whole)[index]) for index in (0, -1))
    same = [name for name in first.shapes if torch.equal(first.tensor("model", name), end.tensor("model", name))]
    assert same == ["subspace"]
    measured = map(json.loads, (whole / "metrics.jsonl").read_text().splitlines())
    assert sum("held_out/power_0.200" in line for line in measured) == 2


@pytest.mark.parametrize(("world_size", "stage", "precision"), [(1, 3, "fp32"), (3, 0, "fp32"), (2, 1, "bf16")])
def test_a_resume_elsewhere_takes_it_from_the_checkpoint(
    job: Job, whole: Path, world_size: int, stage: int, precision: str
) -> None:
    """The subspace is float32, also with bf16 weights.

    The file next to the shards and diffusion.subspace are not needed.
    """
    name, expected = f"elsewhere_{world_size}_{stage}", subspace(job)
    job.copy("whole", name, steps=12)
    path = kept(job)
    hidden = path.rename(job.folder / "hidden")
    try:
        more = [f"engine.zero_stage={stage}", f"engine.precision={precision}", "diffusion.subspace=/none.safetensors"]
        moved = job.train(name, *SETTINGS, *more, world_size=world_size)
        assert not list((job.folder / "shards/real_images").glob("subspace_*")), "it is not fitted again"
    finally:
        hidden.rename(path)
    assert holds_it(last(job.folder / name), expected)
    if precision == "fp32":
        assert losses(training(moved)) == pytest.approx(losses(training(read_metrics(whole))), rel=1e-5)


def training(metrics: list[dict[str, float]]) -> list[dict[str, float]]:
    return [line for line in metrics if "loss" in line]


def test_a_subspace_that_differs_from_the_checkpoint_is_refused(job: Job, whole: Path) -> None:
    """A subspace of another shape belongs to the run's first resolution: it is ignored."""
    job.copy("whole", "other_values", steps=12)
    other = job.folder / "other.safetensors"
    write_subspace(other, random_subspace(48, RANK, 0), {})
    command = job.command("other_values", *SETTINGS, f"diffusion.subspace={other}", f"run.max_steps={STEPS - 11}")
    said = run_ranks(2, *command, expect=2)
    assert f"diffusion.subspace={other}: differs from the subspace of the weights in" in said
    write_subspace(other, random_subspace(12, RANK, 0), {})
    run_ranks(2, *command)
    assert holds_it(last(job.folder / "other_values"), subspace(job))
    said = run_ranks(2, *job.command("fresh", *SETTINGS, f"diffusion.subspace={other}"), expect=2)
    assert f"diffusion.subspace={other}: holds a subspace of shape (12, 5), this network needs (48, 5)" in said
    said = run_ranks(2, *job.command("other_values", *SETTINGS, "diffusion.rank=6"), expect=2)
    assert "the weights belong to another network (diffusion.rank: 5 -> 6)" in said


def test_a_new_run_takes_the_subspace_of_its_initial_weights(job: Job, whole: Path) -> None:
    """The subspace that the run's own seed would give is not used. A named file provides its own subspace."""
    files = set((job.folder / "shards/real_images").iterdir())
    more = ["run.seed=1", "run.max_steps=2", f"run.init_from={whole}", "run.init_weights=power_0.200"]
    job.train("begun", *SETTINGS, *more, f"evaluation.guide={whole}", "evaluation.guidance_scale=2")
    assert set((job.folder / "shards/real_images").iterdir()) == files
    assert holds_it(last(job.folder / "begun"), subspace(job))
    named, own = job.folder / "named.safetensors", random_subspace(48, RANK, 1)
    write_subspace(named, own, {})
    for path, fault in (
        (named, "differs from the subspace of the weights in"),
        (job.folder / "none.safetensors", "readable"),
    ):
        said = run_ranks(2, *job.command("refused", *SETTINGS, *more, f"diffusion.subspace={path}"), expect=2)
        assert str(path) in said
        assert fault in said
    guided = ["evaluation.guidance_scale=2", f"evaluation.grid_every_images={BATCH}", f"evaluation.guide={whole}"]
    job.train("named", *SETTINGS, f"diffusion.subspace={named}", "run.max_steps=2", *guided)
    assert holds_it(last(job.folder / "named"), own)


def test_a_rollback_keeps_it(job: Job, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JITSCALE_FAULTS", "nan:step=6:times=2")
    metrics = job.train("rolled_back", *SETTINGS, "run.rollback_after=2", "run.max_steps=8", world_size=1)
    assert training(metrics)[-1]["skipped_images"] == 3 * BATCH
    assert holds_it(last(job.folder / "rolled_back"), subspace(job))


def test_every_form_of_the_weights_holds_it(job: Job, whole: Path, tmp_path: Path) -> None:
    """The network is bit-equal in safetensors, in a Hugging Face folder, in another run and in post-hoc averages."""
    expected, config = subspace(job), job.folder / "whole/config.yaml"
    original = jitscale.load_model(whole, "ema_0.9")
    images = jitscale.sample(original, [1, 2], steps=3)
    assert images.isfinite().all()
    convert = ["--checkpoint", whole, "--output"]
    for form, more in (
        ("safetensors", []),
        ("huggingface", ["--weights", "ema_0.9"]),
        ("run", ["--weights", "ema_0.9", "--config", config]),
    ):
        done = run_tool("convert_checkpoint", *convert, tmp_path / form, "--to", form, *more)
        assert done.code == 0, done.err
        stored = open_weights(tmp_path / form)
        assert stored.shapes == last(whole).shapes
        found = jitscale.load_model(tmp_path / form, "model" if form == "run" else "ema_0.9")
        assert found.subspace is not None
        assert torch.equal(found.subspace, expected)
        assert torch.equal(jitscale.sample(found, [1, 2], steps=3), images)
    from jitscale.checkpoints.hub import HubJiT  # noqa: PLC0415 (slow)

    assert torch.equal(HubJiT.from_pretrained(tmp_path / "huggingface").subspace, expected)
    done = run_tool("posthoc_ema", "--run", whole, "--widths", 0.15, "--output", tmp_path / "posthoc")
    assert done.code == 0, done.err
    mixed = jitscale.load_model(tmp_path / "posthoc/power_0.150.safetensors")
    assert mixed.subspace is not None
    assert torch.equal(mixed.subspace, expected)
    done = run_tool("convert_checkpoint", *convert, tmp_path / "x", "--to", "run", "--config", config_of_x(config))
    assert done.code == 2
    assert "diffusion.prediction: asym -> x" in done.err


def config_of_x(config: Path) -> Path:
    """The same configuration with x-prediction."""
    path = config.with_name("x.yaml")
    path.write_text(config.read_text().replace("prediction: asym", "prediction: x"))
    return path
