"""The file metrics.jsonl."""

import json
from pathlib import Path

import pytest

from jitscale.config import Config, TrackingConfig
from jitscale.tracking import Tracker, held_out_after, read_held_out, read_metrics


def tracker(run_dir: Path, resumed_step: int | None = 0) -> Tracker:
    run_dir.mkdir(exist_ok=True)
    return Tracker(Config(tracking=TrackingConfig(wandb="off")), run_dir, True, resumed_step)


def test_repeated_steps_appear_once(tmp_path: Path) -> None:
    first = tracker(tmp_path)
    for step in range(1, 8):
        first.log({"step": step, "loss": 1.0})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # A kill truncated this line.
    second = tracker(tmp_path, resumed_step=5)
    for step in (6, 7, 8):
        second.log({"step": step, "loss": 2.0})
    second.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [line["loss"] for line in read_metrics(tmp_path)] == [1.0] * 5 + [2.0] * 3


DAMAGED_LINES = (b'{"loss": 1.0}', b"[3]", b"7", b'{"step": "4"}', b'{"step": true}', b"\xff\xfe", b"", b"[" * 100_000)


def test_damaged_lines_are_left_out_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sound = [json.dumps({"step": step, "loss": 1.0}).encode() for step in range(1, 7)]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([*sound[:2], *DAMAGED_LINES, *sound[2:], *DAMAGED_LINES, b""]))
    (tmp_path / "evaluations.jsonl").write_bytes(b"\xff\n")
    resumed = tracker(tmp_path, resumed_step=4)
    resumed.log({"step": 5})
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    assert f"metrics.jsonl: {len(DAMAGED_LINES)} lines are damaged or incomplete; they are left out" in caplog.text
    assert (tmp_path / "evaluations.jsonl").read_bytes() == b""
    assert f"metrics.jsonl: {len(DAMAGED_LINES)} damaged lines at its end are dropped; the lines before" in caplog.text
    assert "evaluations.jsonl: 1 damaged lines at its end are dropped; no line is left, the file begins" in caplog.text
    caplog.clear()
    resumed.close()
    tracker(tmp_path, resumed_step=4).close()
    assert caplog.text == ""


def test_a_resume_reads_only_the_end_of_the_metrics(tmp_path: Path) -> None:
    """The part before the checkpoint may have any length: here it would not fit into memory."""
    path = tmp_path / "metrics.jsonl"
    end = '\n{"step": 7}\n{"step": 8, "held_out/model": 1}\n{"step": 8, "loss": 2}\n'
    with path.open("wb") as file:
        file.seek(2**40)  # This leaves a hole.
        file.write((end + '{"step": 9}\n{"step": 10, "lo').encode())
    tracker(tmp_path, resumed_step=8).close()
    assert path.stat().st_size == 2**40 + len(end)
    assert held_out_after(tmp_path, 7) == [{"step": 8, "held_out/model": 1}]


def test_lines_of_held_out_samples_are_read_separately(tmp_path: Path) -> None:
    """They do not appear among the steps. A resume and a rollback remove them like other lines."""
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


def test_values_that_are_not_finite_become_null(tmp_path: Path) -> None:
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


def test_a_full_disk_loses_lines_but_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    record = tracker(tmp_path)
    record.log({"step": 1, "images": 8})
    record._metrics = Path("/dev/full")
    record.log({"step": 2, "images": 16})
    record.log({"step": 3, "images": 24})
    record.close()
    assert caplog.text.count("lines are lost, training continues") == 1
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]
