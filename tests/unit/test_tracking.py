"""metrics.jsonl and W&B."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import wandb

from jitscale.config import Config, TrackingConfig
from jitscale.planner import peak_tflops
from jitscale.tracking import Tracker, read_held_out, read_metrics


def tracker(run_dir: Path, resumed_step: int | None = 0, wandb: str = "off") -> Tracker:
    run_dir.mkdir(exist_ok=True)
    return Tracker(Config(tracking=TrackingConfig(wandb=wandb)), run_dir, True, resumed_step)


def test_lines_of_a_repeated_stretch_appear_once(tmp_path: Path) -> None:
    first = tracker(tmp_path)
    for step in range(1, 8):
        first.log({"step": step, "loss": 1.0})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # a kill cut this line short
    second = tracker(tmp_path, resumed_step=5)
    for step in (6, 7, 8):
        second.log({"step": step, "loss": 2.0})
    second.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [line["loss"] for line in read_metrics(tmp_path)] == [1.0] * 5 + [2.0] * 3


def test_lines_of_held_out_samples_stand_aside(tmp_path: Path) -> None:
    """Readers of steps do not meet them; a resume and a rollback take them back as other lines."""
    assert read_held_out(tmp_path) == []
    record = tracker(tmp_path)
    for step in range(1, 7):
        record.log({"step": step, "loss": 1.0})
        if step % 2 == 0:
            record.log({"step": step, "held_out_samples": 3, "held_out/model": float(step), "held_out/ema_0.9": None})
    assert [line["loss"] for line in read_metrics(tmp_path)] == [1.0] * 6
    assert [(line["step"], line["held_out/model"]) for line in read_held_out(tmp_path)] == [
        (2, 2.0),
        (4, 4.0),
        (6, 6.0),
    ]
    record.rewind(5)
    assert [line["step"] for line in read_held_out(tmp_path)] == [2, 4]
    record.close()
    tracker(tmp_path, resumed_step=2).close()
    assert [line["step"] for line in read_held_out(tmp_path)] == [2]
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


def test_what_is_not_finite_becomes_null(tmp_path: Path) -> None:
    record = tracker(tmp_path)
    record.log({"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "mfu": None})
    record.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "loss": None, "grad_norm": None, "mfu": None}


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    record = Tracker(Config(), tmp_path, False, 0)
    record.log({"step": 1})
    record.close()
    assert list(tmp_path.iterdir()) == []


def test_wandb_continues_under_one_id(tmp_path: Path) -> None:
    for resumed in (0, 1):
        record = tracker(tmp_path, resumed, wandb="offline")
        record.log({"step": resumed + 1, "images": 8, "loss": 1.0})
        record.close()
    runs = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(runs) == 2
    assert {path.stem for path in runs} == {f"run-{(tmp_path / 'wandb_id').read_text()}"}
    assert all(path.stat().st_size > 0 for path in runs)


def test_a_second_record_leaves_the_first_ones_file(tmp_path: Path) -> None:
    """A sweep beside the training: what the training writes on is what is read; a line half written is left out."""
    training = tracker(tmp_path)
    training.log({"step": 1})
    tracker(tmp_path, resumed_step=None).close()
    training.log({"step": 2})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


def test_a_wandb_that_cannot_start_falls_back_to_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "")
    caplog.set_level("INFO")
    record = tracker(tmp_path, wandb="online")
    record.log({"step": 1, "images": 8, "loss": 1.0})
    record.close()
    assert len(read_metrics(tmp_path)) == 1
    assert list((tmp_path / "wandb").glob("offline-run-*"))
    assert "W&B failed" in caplog.text
    assert "wandb sync" in caplog.text


def test_a_picture_that_wandb_cannot_take_does_not_stop_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    record = tracker(tmp_path, wandb="offline")
    monkeypatch.setattr(wandb, "Image", lambda picture: picture["no picture"])
    record.log_image("samples", np.zeros((4, 4, 3), np.uint8), 8)
    assert (tmp_path / "samples/images_000000000008.png").exists()
    record.log({"step": 1, "images": 8})
    record.close()
    assert "W&B failed" in caplog.text
    assert len(read_metrics(tmp_path)) == 1


@pytest.mark.parametrize(
    ("name", "peak"), [("NVIDIA H100 NVL", 835.0), ("NVIDIA RTX A4000", None), ("NVIDIA H200", 989.0)]
)
def test_the_peak_is_that_of_the_board(monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_tflops(torch.device("cuda")) == peak


@pytest.mark.slow
def test_an_unreachable_server_does_not_stop_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    record = tracker(tmp_path, wandb="online")
    record.log({"step": 1, "images": 8, "loss": 1.0})
    record.close()
    assert len(read_metrics(tmp_path)) == 1
    assert list((tmp_path / "wandb").glob("offline-run-*"))


def test_a_full_disk_costs_lines_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    record = tracker(tmp_path, wandb="off")
    record.log({"step": 1, "images": 8})
    record._file.close()
    record._file = open("/dev/full", "w")  # noqa: SIM115
    record.log({"step": 2, "images": 16})
    record.log({"step": 3, "images": 24})
    record.close()
    assert caplog.text.count("lines will be missing, training goes on") == 1
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]
