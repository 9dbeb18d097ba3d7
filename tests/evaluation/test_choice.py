"""The network that `evaluation.features=auto` chooses, and the warning if a small network measures other images."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jitscale import evaluate
from jitscale.config import Config, load_config, to_yaml
from jitscale.data.manifest import Manifest
from jitscale.data.shards import ShardSet
from jitscale.errors import ConfigError, DataError
from jitscale.evaluation.choice import settle_features, settle_for_training
from jitscale.evaluation.dinov2 import DinoV2
from jitscale.evaluation.networks import FEATURE_NETWORKS, PUBLISHED
from jitscale.evaluation.published import Published
from jitscale.preparation.array_shards import write_shards
from jitscale.preparation.digits import DIGIT_CLASSES, digit_images
from jitscale.tracking import read_evaluations
from tests.support.processes import run_ranks
from tests.support.tiny import model_yaml
from tools import make_reference, submit

FETCH = "on a machine with a network: python tools/fetch_weights.py --output"


class SmallDinoV2(DinoV2):
    """DINOv2 with fewer and narrower blocks, so that its file is written quickly."""

    weights = Published("https://nowhere/small_dinov2.pth", "", "dinov2")
    num_features = 16

    def __init__(self) -> None:
        super().__init__(width=16, depth=1, heads=2)


@pytest.fixture
def small_dinov2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FEATURE_NETWORKS, "dinov2", SmallDinoV2)
    monkeypatch.setitem(PUBLISHED, "dinov2", SmallDinoV2.weights)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A configuration, and shards of the digits: marked by the tool that makes them, and without a mark as a user's."""
    images, labels = digit_images(16)
    for name, dataset in (("digits", "digits"), ("own", None)):
        write_shards(images[:40], labels[:40], tmp_path / name, class_names=DIGIT_CLASSES, dataset=dataset)
    (tmp_path / "config.yaml").write_text(f"""
{model_yaml()}
data: {{batch_size: 8, num_workers: 0, shards: {tmp_path / "own"}}}
engine: {{precision: fp32}}
ema: {{decays: [0.9]}}
evaluation: {{features: auto, features_dir: {tmp_path / "weights"}, weights: model, at_end: true, num_images: 20,
  block_size: 20, steps: 1, method: euler, every_images: 8, few_images: 10}}
run: {{max_steps: 2, device: cpu, dir: {tmp_path / "run"}}}
""")
    (tmp_path / "weights").mkdir()
    return tmp_path


def configured(folder: Path, *overrides: str) -> Config:
    return load_config(folder / "config.yaml", list(overrides))


def put(folder: Path, *names: str) -> None:
    """Put files where the published weights of networks belong. The choice does not depend on their content."""
    for name in names:
        (folder / "weights" / PUBLISHED[name].file_name).touch()


@pytest.mark.parametrize(
    ("data", "at_hand", "chosen"),
    [
        ("digits", ("inception", "dinov2"), "digits"),
        ("own", ("inception", "dinov2"), "inception"),
        ("own", ("dinov2",), "dinov2"),
        ("own", (), None),
    ],
)
def test_auto_prefers_the_images_own_network_then_inception(
    folder: Path, data: str, at_hand: tuple[str, ...], chosen: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    put(folder, *at_hand)
    config = configured(folder, f"data.shards={folder / data}", "evaluation.more_features=[dinov2]")
    settled, missing = settle_features(config)
    if chosen is None:
        what = (
            f"evaluation.features=auto: no weights of inception or dinov2 in {folder / 'weights'}, so there is no FID"
        )
        assert missing == f"{what}; {FETCH} {folder / 'weights'} inception"
        assert settled == config
        return
    assert (settled.evaluation.features, missing) == (chosen, "")
    assert settled.evaluation.more_features == ([] if chosen == "dinov2" else ["dinov2"]), "no network is used twice"
    assert f"evaluation.features=auto: {chosen} (" in caplog.text
    assert config.evaluation.features == "auto"


def test_a_run_keeps_its_network_or_reports_the_change(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    config = configured(folder)
    put(folder, "inception", "dinov2")
    (folder / "run").mkdir()
    (folder / "run/config.yaml").write_text(to_yaml(config))
    (folder / "run/result.json").write_text(json.dumps({"protocol": {"features": "dinov2"}}))
    assert settle_features(config)[0].evaluation.features == "dinov2", (
        "the network of the result, because the settings name none"
    )
    assert "auto: dinov2 (as before)" in caplog.text
    (folder / "run/config.yaml").write_text(to_yaml(configured(folder, "evaluation.features=dinov2")))
    (folder / "run/result.json").write_text("[")
    assert settle_features(config)[0].evaluation.features == "dinov2", "the network of the settings"
    (folder / "weights" / PUBLISHED["dinov2"].file_name).unlink()
    caplog.clear()
    assert settle_features(config)[0].evaluation.features == "inception"
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("evaluation.features=auto: inception, because the weights of dinov2, which ")
    assert said.endswith(f"distances of the two are not comparable; {FETCH} {folder / 'weights'} dinov2")
    (folder / "run/config.yaml").write_text(to_yaml(configured(folder, "evaluation.features=glyphs")))
    assert settle_features(config)[0].evaluation.features == "inception", "a network for other images is never kept"


def test_a_small_network_on_other_images_is_a_one_line_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The mark of the tool that wrote the shards decides. Ten classes with the same names prove nothing."""
    settle_for_training(configured(folder, "evaluation.features=digits", f"data.shards={folder / 'digits'}"))
    assert not caplog.records
    for setting, value in (("features", "digits"), ("features", "glyphs"), ("more_features", "[glyphs]")):
        caplog.clear()
        other = [] if setting == "features" else ["evaluation.features=inception"]
        settle_for_training(configured(folder, f"evaluation.{setting}={value}", *other))
        (said,) = [record.getMessage() for record in caplog.records]
        name = value.strip("[]")
        assert said.startswith(f"evaluation.{setting}: {name} is only for images of tools/make_{name}.py, but")
    caplog.clear()
    idle = ["evaluation.at_end=false", "evaluation.every_images=0"]
    settle_for_training(configured(folder, "evaluation.features=glyphs", *idle))
    assert not caplog.records, "without measurements there is no warning"


def test_the_mark_is_stored_in_the_manifest(folder: Path) -> None:
    assert Manifest.read(folder / "digits/manifest.json").dataset == "digits"
    assert Manifest.read(folder / "own/manifest.json").dataset is None
    assert ShardSet.open(folder / "digits", 10).dataset == "digits"
    damaged = (folder / "own/manifest.json").read_text().replace('"dataset": null', '"dataset": 3')
    (folder / "own/manifest.json").write_text(damaged)
    with pytest.raises(DataError, match="dataset is 3, not a name or null"):
        ShardSet.open(folder / "own", 10)


@pytest.mark.parametrize(
    ("content", "chosen"),
    [
        ({"mu": np.zeros(2048)}, "inception"),
        ({"mu": np.zeros(1024)}, "dinov2"),
        ({"mu": np.zeros(64), "facts": np.array('{"features": "glyphs"}')}, "glyphs"),
        ({"mu": np.zeros(64)}, "does not name the network of its 64 features; set evaluation.features"),
        ({"sigma": np.zeros(64)}, "no statistics of features"),
    ],
)
def test_statistics_determine_their_network(folder: Path, content: dict[str, Any], chosen: str) -> None:
    put(folder, "inception", "dinov2")
    np.savez(folder / "statistics.npz", **content)
    config = configured(folder, f"evaluation.reference={folder / 'statistics.npz'}")
    if chosen not in FEATURE_NETWORKS:
        with pytest.raises(DataError, match=chosen):
            settle_features(config)
    else:
        assert settle_features(config)[0].evaluation.features == chosen


def test_settings_that_conflict_with_auto_are_refused(folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"features_file=w\.pth needs the name of its network, and evaluation\.features="
    ):
        configured(folder, "evaluation.features_file=w.pth")
    with pytest.raises(ConfigError, match=r"names the network of evaluation\.features=dinov2 again"):
        configured(folder, "evaluation.features=dinov2", "evaluation.more_features=[dinov2]")


def test_a_submission_fails_before_a_job_waits_in_the_queue(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    command = [f"--config={folder / 'config.yaml'}", "--tasks-per-node=1", f"--folder={folder / 'jobs'}", "--dry-run"]
    assert submit.main(command) == 0
    (said,) = [record.getMessage() for record in caplog.records]
    assert f"so there is no FID; {FETCH} {folder / 'weights'} inception; then " in said
    put(folder, "inception")
    caplog.clear()
    assert submit.main(command) == 0
    assert not caplog.records


@pytest.mark.usefixtures("small_dinov2")
def test_a_run_without_a_network_is_trained_and_measured_later(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """DINOv2 measures it; its distance is not called FID.

    Preflight prints the command, train prints it at the start and at the end.
    """
    command = ["--config", str(folder / "config.yaml")]
    missing = f"{FETCH} {folder / 'weights'} inception; then python -m jitscale.evaluate --run {folder / 'run'}"
    assert run_ranks(1, "-m", "jitscale.launch.preflight", *command).count(missing) == 1
    assert run_ranks(1, "-m", "jitscale.train", *command).count(missing) == 2
    assert not (folder / "run/result.json").exists()
    assert read_evaluations(folder / "run") == []
    with pytest.raises(ConfigError, match="no weights of inception or dinov2"):
        evaluate.main(["--run", str(folder / "run")])

    torch.manual_seed(0)
    torch.save(SmallDinoV2().state_dict(), folder / "weights" / SmallDinoV2.weights.file_name)
    capsys.readouterr()
    axes = 'evaluation.sweep=["guidance=1,2"]'
    assert evaluate.main(["--run", str(folder / "run")]) == 0
    result = json.loads((folder / "run/result.json").read_text())
    assert {"fd_dinov2", "kd_dinov2", "precision"} <= result.keys()
    assert not {"fid", "kid", "inception_score", "label_agreement"} & result.keys()
    assert result["protocol"]["features"] == "dinov2"
    assert "FD dinov2" in capsys.readouterr().out
    put(folder, "inception")
    assert evaluate.main(["--run", str(folder / "run"), axes, "evaluation.sweep_images=10"]) == 0
    assert "FID" not in capsys.readouterr().out, "the network stays the same, although Inception exists now"
    (swept,) = (folder / "run/results").glob("sweep_dinov2_20_*.json")
    assert [row["fd_dinov2"] > 0 for row in json.loads(swept.read_text())["table"]] == [True] * 3
    assert swept.with_suffix(".svg").exists()
    # The cache of real images distinguishes the arrays of the main network from those of the same network as an
    # additional one.
    further = ["evaluation.features=digits", "evaluation.more_features=[dinov2]", "evaluation.num_images=10"]
    assert evaluate.main(["--run", str(folder / "run"), *further]) == 0
    assert make_reference.main([*command, "--output", str(folder / "reference.npz")]) == 0
    assert json.loads(str(np.load(folder / "reference.npz")["facts"]))["features"] == "dinov2"
