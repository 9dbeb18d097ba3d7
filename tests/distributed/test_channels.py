"""Grey images keep one channel from the shards to the exports, with asym and a middle layer, in real processes."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

import jitscale
from jitscale.checkpoints.format import Checkpoint, complete_checkpoints
from jitscale.checkpoints.opening import open_weights, read_guide
from jitscale.config import Config, EvaluationConfig, ModelConfig, load_config
from jitscale.data.shards import ShardSet
from jitscale.errors import ConfigError
from jitscale.evaluation.real_images import pixels_of
from jitscale.tracking import SAMPLES, read_held_out, read_metrics
from jitscale.training.subspace import read_subspace
from tests.support.runs import BATCH, STEPS, Job, losses, same_state
from tests.support.tools import run_tool

HALF, RANK = STEPS // 2, 5
GREY = (
    *("model.in_channels=1", "model.attn_dropout=0", "model.proj_dropout=0", "model.middle_head=1"),
    *("diffusion.prediction=asym", f"diffusion.rank={RANK}"),
    *("data.held_out=0.2", f"evaluation.held_out_every_images={STEPS * BATCH}"),
    *(f"evaluation.grid_every_images={STEPS * BATCH}", "evaluation.steps=2", "evaluation.internal_guidance=1.5"),
    *("evaluation.at_end=true", "evaluation.features=digits", "evaluation.num_images=10"),
)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(tmp_path_factory.mktemp("grey"), channels=1)


@pytest.fixture(scope="module")
def run(job: Job) -> Path:
    """An uninterrupted run of two ranks in stage 2."""
    job.train("run", *GREY, "engine.zero_stage=2")
    return job.folder / "run"


def last(run: Path) -> Checkpoint:
    return Checkpoint(complete_checkpoints(run)[-1])


def test_a_run_of_one_channel(run: Path) -> None:
    assert all(0 < loss < 10 for loss in losses(read_metrics(run)))
    shapes = last(run).shapes
    assert shapes["x_embedder.proj1.weight"] == (8, 1, 4, 4)
    assert shapes["final_layer.linear.weight"] == shapes["middle_layer.linear.weight"] == (16, 32)
    assert shapes["subspace"] == (16, RANK)
    assert read_held_out(run)[-1]["held_out/ema_0.9"] > 0
    (grid,) = (run / SAMPLES).glob("*.png")
    with Image.open(grid) as picture:
        assert (picture.mode, picture.size) == ("L", (8 * 18, 10 * 18))


def test_grey_images_have_statistics_of_their_own(job: Job, run: Path) -> None:
    """Their statistics have a key of their own. The key of the same shards read as RGB is the same as before."""
    result = json.loads((run / "result.json").read_text())
    assert result["fid"] > 0
    assert result["reference"]["channels"] == 1
    (facts,) = (json.loads(path.read_text()) for path in job.folder.glob("shards/real_images/digits_*/facts.json"))
    grey, colour = (pixels_of(ShardSet.open(job.folder / "shards", 10, 16, channels=each)) for each in (1, 3))
    assert {key: facts[key] for key in grey} == grey
    assert colour.keys() == {"manifest", "image_size"}


def test_a_resume_in_stage_3(job: Job, run: Path) -> None:
    job.copy("run", "resumed", steps=HALF)
    assert losses(job.train("resumed", *GREY, "engine.zero_stage=3")) == pytest.approx(
        losses(read_metrics(run)), rel=1e-5
    )


def test_a_resume_equals_the_unbroken_run(job: Job, run: Path) -> None:
    job.copy("run", "again", steps=HALF)
    job.train("again", *GREY, "engine.zero_stage=2", "evaluation.at_end=false")
    assert same_state(last(job.folder / "again").path, last(run).path)


def test_weights_with_other_channels_are_refused(job: Job, run: Path) -> None:
    colour = load_config(job.folder / "config.yaml")
    colour.evaluation = EvaluationConfig(guide=str(run))
    with pytest.raises(ConfigError, match=r"cannot guide this network .*model.in_channels: 1 there, 3 here"):
        read_guide(colour, None)
    where = ["--checkpoint", run, "--to", job.folder / "config.yaml", "--output", job.folder / "colour"]
    done = run_tool("upgrade_resolution", *where, *GREY, "model.in_channels=3")
    assert done.code == 2
    assert "model.in_channels: 1 -> 3" in done.err


@pytest.mark.parametrize("mode", ["patch", "tokens"])
def test_an_upgrade(job: Job, run: Path, mode: str) -> None:
    """The tool itself compares both functions."""
    resized = ["model.patch_size=8"] if mode == "patch" else ["model.position_grid=4"]
    where = ["--checkpoint", run, "--to", job.folder / "config.yaml", "--output", job.folder / mode]
    preview = job.folder / f"{mode}.png"
    settings = [*GREY, *resized, "model.image_size=32", "diffusion.noise_scale=2.0"]
    done = run_tool("upgrade_resolution", *where, "--mode", mode, "--preview", preview, *settings)
    assert done.code == 0, done.err
    assert done.out.rstrip().endswith(" ".join([f"run.dir={job.folder / mode}", *settings])), (
        "the tool prints the complete command"
    )
    checks = re.findall(r"self-check of \S+: (.*)", done.out)
    if mode == "patch":
        parts = ("patch embedding", "output layer", "middle output layer", "subspace", "whole network")
        for check in checks:
            assert [part.rpartition(" ")[0] for part in check.split(", ")] == list(parts)
            assert all(float(part.rpartition(" ")[2]) < 1e-5 for part in check.split(", "))
        assert last(job.folder / mode).shapes["x_embedder.proj1.weight"] == (8, 1, 8, 8)
    assert len(checks) == 3
    with Image.open(preview) as picture:
        assert picture.mode == "L"
    assert jitscale.sample(jitscale.load_model(job.folder / mode), [3], steps=2).shape == (1, 1, 32, 32)


@pytest.mark.parametrize("form", ["safetensors", "huggingface"])
def test_exports_can_be_read_again(job: Job, run: Path, form: str) -> None:
    output, weights = job.folder / form, ["--weights", "ema_0.9"]
    done = run_tool("convert_checkpoint", "--checkpoint", run, "--to", form, "--output", output, *weights)
    assert done.code == 0, done.err
    before, after = open_weights(run), open_weights(output)
    assert after.config.model == before.config.model
    assert after.shapes == before.shapes
    assert all(torch.equal(after.tensor("ema_0.9", name), before.tensor("ema_0.9", name)) for name in before.shapes)
    images = jitscale.sample(jitscale.load_model(output), [1, 2], steps=2, internal_guidance=1.5)
    assert images.shape == (2, 1, 16, 16)
    first, second = jitscale.to_pil(images)
    assert (first.mode, second.size) == ("L", (16, 16))
    assert first.tobytes() == ((images[0].clamp(-1, 1) + 1) * 127.5).round().byte().numpy().tobytes()


def test_the_authors_format_refuses_grey_networks(job: Job, run: Path) -> None:
    output = job.folder / "checkpoint-last.pth"
    averages = ["--ema1", "ema_0.9", "--ema2", "ema_0.99"]
    done = run_tool("convert_checkpoint", "--checkpoint", run, "--to", "authors", "--output", output, *averages)
    assert done.code == 2
    assert "diffusion.prediction=asym, model.in_channels=1, and the authors' code predicts x of RGB" in done.err
    assert done.err.count("\n") == 1
    assert not output.exists()


def test_single_grey_images_are_saved(job: Job, run: Path) -> None:
    folder = job.folder / "samples"
    classes = ["--classes", 1, 2, "--per-class", 2, "--steps", 2, "--device", "cpu"]
    done = run_tool("sample", "--checkpoint", run, "--output", folder, *classes)
    assert done.code == 0, done.err
    shapes = {}
    for path in folder.glob("*.png"):
        with Image.open(path) as picture:
            shapes[path.name] = (picture.mode, picture.size)
    assert shapes.pop("grid.png") == ("L", (2 * 18, 2 * 18))
    assert list(shapes.values()) == [("L", (16, 16))] * 4


def test_a_subspace_of_grey_patches_in_a_file(job: Job) -> None:
    file = job.folder / "P.safetensors"
    sizes = ["--image-size", 16, "--patch-size", 4, "--rank", RANK, "--workers", 1]
    where = ["--shards", job.folder / "shards", "--output", file]
    assert run_tool("fit_subspace", *where, *sizes, "--channels", 1).code == 0
    model = ModelConfig(image_size=16, patch_size=4, in_channels=1)
    config = Config(model=model)
    config.diffusion.prediction, config.diffusion.rank = "asym", RANK
    assert read_subspace(file, model, config.diffusion).shape == (16, RANK)
