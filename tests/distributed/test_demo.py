"""The demo in miniature: every stage and every file, not its quality."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from PIL import Image

from jitscale.config import load_config
from jitscale.tracking import read_metrics
from jitscale.training.checkpoint import Checkpoint, complete_checkpoints
from tests.distributed.processes import ROOT


def run(output: Path) -> str:
    small = ["--images", "1280", "--finetune-images", "256", "--samples", "64"]
    finished = subprocess.run(
        [sys.executable, "tools/demo.py", "--output", str(output), *small],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout + finished.stderr


def test_the_whole_path(tmp_path: Path) -> None:
    said = run(tmp_path)
    assert "img/s" in said
    for name, size in (("32px", 32), ("64px", 64)):
        folder = tmp_path / name
        assert load_config(folder / "config.yaml").model.image_size == size
        assert list(folder.glob("wandb/offline-run-*/run-*.wandb"))
        assert complete_checkpoints(folder)
        assert all(line["loss"] > 0 for line in read_metrics(folder))
    result = json.loads((tmp_path / "result.json").read_text())
    assert all(result[name]["fid"] > result[name]["fid_floor"] > 0 for name in ("untrained", "32px", "64px"))
    assert 0 <= result["64px"]["label_agreement"] <= 1
    assert Image.open(tmp_path / "samples.png").width > 800
    assert Image.open(tmp_path / "loss.png").width > 400

    # The upgraded run began with the moments of all but the resized parameters.
    high = Checkpoint(complete_checkpoints(tmp_path / "64px")[-1])
    assert high.progress.optimizer_step == 10 + 2
    assert high.progress.images == 256

    # The same command again finds everything done.
    again = run(tmp_path)
    assert "upgrade to 64 px" not in again
    assert json.loads((tmp_path / "result.json").read_text())["64px"] == result["64px"]
