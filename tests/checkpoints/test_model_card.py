"""The model card of an export: its metadata for the hub, its picture, its numbers, and that its commands run."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

import jitscale
from jitscale import evaluate
from jitscale.checkpoints.hub import HubJiT
from jitscale.checkpoints.model_card import Card
from jitscale.checkpoints.opening import open_weights
from jitscale.config import (
    Config,
    DataConfig,
    DiffusionConfig,
    EngineConfig,
    EvaluationConfig,
    ModelConfig,
    RunConfig,
    to_yaml,
)
from jitscale.evaluation import showcase
from jitscale.evaluation.features import to_uint8
from jitscale.preparation.array_shards import write_shards
from jitscale.preparation.digits import digit_images
from tests.support.tiny import MODEL
from tests.support.weights import convert, run_of, settings


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose EMA weights were measured with guidance."""
    folder = tmp_path_factory.mktemp("run")
    images, labels = digit_images(16)
    write_shards(images[:20], labels[:20], folder / "digits_16")
    of_samples = {"features": "digits", "num_images": 16, "block_size": 8, "guidance_scale": 2.0, "seed": 3}
    config = replace(
        settings(diffusion=DiffusionConfig(noise_scale=2.0)),
        data=DataConfig(shards=str(folder / "digits_16"), num_workers=0),
        engine=EngineConfig(precision="fp32"),
        evaluation=EvaluationConfig(weights="ema_0.9", steps=2, method="euler", **of_samples),  # type: ignore[arg-type]
        run=RunConfig(dir=str(folder), max_steps=7, device="cpu"),
    )
    (folder / "config.yaml").write_text(to_yaml(config))
    run_of(folder, config)
    assert evaluate.main(["--run", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("form", ["huggingface", "diffusers"])
def test_the_card_of_a_measured_run(form: str, run: Path, tmp_path: Path) -> None:
    folder = convert(run, form, tmp_path / "out", "--license", "mit")
    result = json.loads((run / "result.json").read_text())
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "mit"
    assert card.data.library_name == "jitscale", "the tag of diffusers would show a call with a text prompt"
    assert card.data.pipeline_tag is None, "the hub has no task for class labels"
    assert card.data.tags == [
        "jit",
        "diffusion",
        "pixel-space",
        "class-conditional",
        *["diffusers"] * (form == "diffusers"),
    ]
    found = {entry.metric_type: entry for entry in card.data.eval_results}
    distance = found["fid_digits"]  # The key is not `fid`, because these are not Inception's features.
    assert distance.metric_value == result["fid"]
    assert distance.dataset_name == "digits_16", "the card contains no path of this machine"
    assert distance.metric_args == {
        **{"weights": "ema_0.9", "method": "euler", "steps": 2, "guidance_scale": 2.0, "guidance_interval": [0.1, 1.0]},
        **{"images": 16, "labels": "balanced", "features": "digits"},
    }
    assert "do not compare these numbers with published FIDs" in card.text
    assert str(run) not in card.content
    assert ("Always pass `noise_scale=2`" in card.text) == (form == "diffusers")

    lines = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert lines is not None
    names: dict[str, object] = {}
    exec(lines[1].replace("hf://OWNER/NAME", str(folder)).replace("sample.png", str(tmp_path / "sample.png")), names)
    images = names["images"]
    assert isinstance(images, torch.Tensor)
    assert images.shape == (4, 3, 16, 16)

    picture = np.asarray(Image.open(folder / "samples.png"))
    assert "![8 samples](samples.png)" in card.text
    for number, image in enumerate(to_uint8(images).permute(0, 2, 3, 1).numpy()):
        drawn = picture[1:17, 18 * number + 1 : 18 * number + 17]
        assert np.abs(drawn.astype(int) - image).max() <= 1, (
            "the card's code draws the card's picture, up to the rounding of another batch size"
        )


def test_the_card_of_a_run_measured_by_another_network(run: Path, tmp_path: Path) -> None:
    """DINOv2 gives no FID, so the metric keeps its own name."""
    measured_run = shutil.copytree(run, tmp_path / "run")
    result = json.loads((measured_run / "result.json").read_text())
    result["fd_dinov2"] = result.pop("fid")
    result["protocol"]["features"] = "dinov2"
    shutil.rmtree(measured_run / "results", ignore_errors=True)
    (measured_run / "result.json").write_text(json.dumps(result))
    card = ModelCard.load(convert(measured_run, "huggingface", tmp_path / "out", "--samples", 0) / "README.md")
    metrics = {entry.metric_type: entry.metric_value for entry in card.data.eval_results}
    assert metrics["fd_dinov2"] == result["fd_dinov2"]
    assert not [name for name in metrics if name.startswith("fid")]
    assert "small network" not in card.text


def test_the_card_shows_numbers_of_the_exported_weights_only(run: Path, tmp_path: Path) -> None:
    card = ModelCard.load(
        convert(run, "huggingface", tmp_path / "out", "--weights", "model", "--samples", 0) / "README.md"
    )
    assert card.data.eval_results is None
    assert "Not measured." in card.text
    assert "samples" not in " ".join(path.name for path in (tmp_path / "out").iterdir())
    assert card.data.license is None
    assert "Not stated." in card.text


def test_a_damaged_result_is_a_one_line_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_of(tmp_path / "run", settings())
    (folder / "result.json").write_text('{"fid": 3}')
    with pytest.raises(jitscale.errors.UserError, match=r"json: is not a result of an evaluation \('protocol'\)"):
        convert(folder, "huggingface", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_card_of_an_unconditional_network(tmp_path: Path) -> None:
    diffusion = DiffusionConfig(label_drop=0.0)
    folder = convert(
        run_of(tmp_path / "run", settings(num_classes=0, diffusion=diffusion)), "huggingface", tmp_path / "out"
    )
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "unconditional-image-generation"
    assert "unconditional" in card.data.tags
    assert "class-conditional" not in card.content
    assert "labels=[0, 0]" in card.text


def test_without_guidance_and_classes_the_card_does_not_mention_them() -> None:
    config = Config(model=ModelConfig(num_classes=0))
    text = Card(config, "model", is_diffusers=True).text
    assert "equal steps without guidance." in text
    assert "modulo the classes" not in text
    config.evaluation.guidance_scale, config.model.num_classes = 2.0, 5
    text = Card(config, "model", is_diffusers=True).text
    assert "equal steps with guidance in an interval." in text
    assert "modulo the classes" in text


def test_the_card_of_a_network_saved_from_python(tmp_path: Path) -> None:
    HubJiT(MODEL, DiffusionConfig(), "ema_0.9").save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag is None
    assert "10 classes (class-conditional)" in card.text
    assert "`ema_0.9`" in card.text


def test_slow_default_samples_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = Config(run=RunConfig(device="cpu"))  # The settings are those of JiT-B at 256 px with 50 Heun steps.
    stored = open_weights(run_of(tmp_path / "run", settings()))
    assert showcase.draw_samples(stored, "model", config, None, tmp_path) == []
    said = r"samples: none, because \de\+13 FLOP .*; --samples 8 draws them anyway\n"
    assert re.fullmatch(said, capsys.readouterr().out)


def test_a_picture_takes_at_most_300_kilobytes(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1024, 2048, 3), np.uint8)
    for image, suffix in ((noise, ".jpg"), (noise[:64, :64], ".png")):
        path = showcase._written(Image.fromarray(image), tmp_path)
        assert path.suffix == suffix
        assert path.stat().st_size <= 300_000
        Image.open(path).load()


def test_images_that_are_not_finite_stop_the_export(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", settings(), scale=1e4)
    with pytest.raises(jitscale.errors.UserError, match=r"values that are not finite.*--samples 0 writes the weights"):
        convert(run, "huggingface", tmp_path / "out")
    assert not (tmp_path / "out").exists()
