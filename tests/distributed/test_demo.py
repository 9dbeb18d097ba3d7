"""The demo in miniature: all of its stages and files. Its quality is not tested."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from jitscale.checkpoints.format import Checkpoint, complete_checkpoints
from jitscale.config import load_config
from jitscale.tracking import read_metrics
from tests.support import ROOT
from tests.support.recorded import check_recorded


def run(output: Path) -> str:
    small = ["--images", "512", "--finetune-images", "256", "--samples", "16", "--sampler-steps", "2"]
    finished = subprocess.run(
        [sys.executable, "tools/demo.py", "--output", str(output), *small],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout + finished.stderr


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The demo's folder and its output."""
    folder = tmp_path_factory.mktemp("demo")
    return folder, run(folder)


def test_the_demo_runs_to_its_end(demo: tuple[Path, str]) -> None:
    output, said = demo
    assert "img/s" in said
    for name, size in (("32px", 32), ("64px", 64)):
        folder = output / name
        assert load_config(folder / "config.yaml").model.image_size == size
        assert list(folder.glob("wandb/offline-run-*/run-*.wandb"))
        assert complete_checkpoints(folder)
        assert all(line["loss"] > 0 for line in read_metrics(folder))
        check_recorded(folder)
    result = json.loads((output / "result.json").read_text())
    assert all(result[name]["fid"] > result[name]["fid_floor"] > 0 for name in ("untrained", "32px", "64px"))
    assert 0 <= result["64px"]["label_agreement"] <= 1
    assert Image.open(output / "samples.png").width > 800
    assert Image.open(output / "loss.png").width > 400

    # The upgraded run kept all moments except those of the resized parameters.
    high = Checkpoint(complete_checkpoints(output / "64px")[-1])
    assert high.progress.optimizer_step == 4 + 2
    assert high.progress.images == 256


@pytest.mark.slow
def test_the_same_command_again_finds_everything_done(demo: tuple[Path, str]) -> None:
    output, _ = demo
    result = json.loads((output / "result.json").read_text())
    assert "upgrade to 64 px" not in run(output)
    assert json.loads((output / "result.json").read_text())["64px"] == result["64px"]
