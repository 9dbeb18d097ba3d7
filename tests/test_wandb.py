"""The records of a run in W&B, offline or with a server that refuses it."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb

from jitscale.config import Config, DataConfig, TrackingConfig
from jitscale.errors import ConfigError
from jitscale.tracking import Tracker, _own_id, check_wandb, distance_of, read_metrics, sweep_lines
from tests.support import ROOT
from tests.support.wandb_records import recorded, records

KEY = "0" * 40


@pytest.fixture(autouse=True)
def no_wandb_settings(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """W&B finds no key and no settings of the machine's user. Returns the empty folder in which it looks for them."""
    folder = tmp_path_factory.mktemp("wandb_settings")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(folder / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(folder))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(folder)
    wandb.teardown()  # wandb caches what it has read.
    yield folder
    wandb.teardown()


def tracker(run_dir: Path, resumed_step: int | None = 0, wandb: str = "off") -> Tracker:
    run_dir.mkdir(exist_ok=True)
    return Tracker(Config(tracking=TrackingConfig(wandb=wandb)), run_dir, True, resumed_step)


LIFE = """
import os, signal, sys, time
from pathlib import Path
from jitscale.config import Config, TrackingConfig
from jitscale.tracking import Tracker
record = Tracker(Config(tracking=TrackingConfig(wandb="offline")), Path(sys.argv[1]), True, int(sys.argv[2]))
for step in range(int(sys.argv[2]) + 1, int(sys.argv[3]) + 1):
    record.log({"step": step, "images": 8 * step, "loss": 1 / step})
if sys.argv[4] == "killed":
    (file,) = Path(sys.argv[1]).glob("wandb/offline-run-*/run-*.wandb")
    while file.stat().st_size < 2**19:  # lines are on their way to the process that writes the file
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGKILL)
record.close()
"""


def live(run_dir: Path, last: int, until: int, end: str) -> None:
    """Run a process that records the steps after `last` up to `until`. It is then killed, or it closes the record."""
    command = [sys.executable, "-c", LIFE, str(run_dir), str(last), str(until), end]
    code = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60, check=False).returncode
    assert code == (-signal.SIGKILL if end == "killed" else 0)


def test_wandb_continues_under_one_id(tmp_path: Path) -> None:
    """One process is killed, the next one repeats some steps and is requeued, the last one continues to the end."""
    live(tmp_path, 0, 2000, "killed")
    live(tmp_path, 500, 2004, "requeued")
    live(tmp_path, 2004, 2006, "done")
    ids, history, summary, _ = recorded(tmp_path)
    assert ids == [(tmp_path / "wandb_id").read_text()] * 3
    again = next(number for number in range(1, len(history)) if history[number]["step"] == 501 != number + 1)
    # W&B writes every 15 seconds, or when 32 KiB are full, so the killed process loses its last lines.
    assert 1000 < again <= 2000
    assert [line["step"] for line in history] == [*range(1, again + 1), *range(501, 2007)]
    assert all(line["images"] == 8 * line["step"] for line in history)
    assert summary["step"] == 2006
    assert [line["step"] for line in read_metrics(tmp_path)] == [*range(1, 2007)]


def sweep_row(weights: str, scale: float, num_images: int, fid: float | None, low: float = 0.1) -> dict[str, Any]:
    return {
        "weights": weights,
        "guidance_scale": scale,
        "guidance_interval": [low, 1.0],
        "num_images": num_images,
        "fid": fid,
        "inception_score": None if fid is None else 10 / fid,
    }


def final_result(table: list[dict[str, Any]]) -> dict[str, Any]:
    best = {"weights": "ema_0.9", "guidance_scale": 2.0, "guidance_interval": [0.1, 1.0]}
    numbers = {"fid": 3.0, "inception_score": 4.0, "kid": float("nan")}
    return {**numbers, "protocol": {"weights": "ema_0.9"}, "best": best, "table": table}


def test_samples_curves_table_and_summary_are_recorded(tmp_path: Path) -> None:
    record = tracker(tmp_path, wandb="offline")
    record.log({"step": 1, "images": 8, "loss": 0.5, "mfu": None})
    record.log_image("samples", np.full((4, 6, 3), 9, np.uint8), 8)
    record.log_result({"fid": 9.0, "protocol": {"weights": "ema_0.9"}}, 1, 8)
    coarse = [
        sweep_row("ema_0.9", 3.0, 100, 6.0),
        sweep_row("model", 1.0, 100, None),
        sweep_row("model", 2.0, 100, 7.0),
    ]
    record.log_final(final_result([*coarse, sweep_row("ema_0.9", 2.0, 100, 5.0), sweep_row("ema_0.9", 2.0, 500, 3.0)]))
    record.close()

    _, history, summary, folder = recorded(tmp_path)
    assert {"step": 1, "images": 8, "loss": 0.5}.items() <= history[0].items()
    assert "mfu" not in history[0]
    picture = next(line for line in history if "samples.path" in line)
    assert (picture["images"], picture["samples.width"], picture["samples.height"]) == (8, 6, 4)
    assert (folder / "files" / picture["samples.path"]).stat().st_size == picture["samples.size"]
    assert any(line.get("evaluation/fid") == 9.0 and line["images"] == 8 for line in history)

    table = json.loads((folder / "files" / summary["sweep.path"]).read_text())
    assert table["columns"] == [
        "weights",
        "guidance_scale",
        "guidance_interval",
        "internal_guidance",
        "internal_interval",
        "num_images",
        "fid",
        "inception_score",
    ]
    assert [row[5:7] for row in table["data"]] == [[100, 6.0], [100, None], [100, 7.0], [100, 5.0], [500, 3.0]]
    assert {row[2] for row in table["data"]} == {"0.1:1"}
    curve = json.loads((folder / "files" / summary["fid_over_guidance_table.path"]).read_text())
    assert curve["data"] == [[2.0, "ema_0.9", 5.0], [3.0, "ema_0.9", 6.0], [2.0, "model", 7.0]]

    assert (summary["fid"], summary["inception_score"], summary["loss"]) == (3.0, 4.0, 0.5)
    best = {key.removeprefix("best/"): value for key, value in summary.items() if key.startswith("best/")}
    assert best == {"weights": "ema_0.9", "guidance_scale": 2.0, "guidance_interval": "0.1:1"}
    assert "kid" not in summary


def test_one_setting_makes_no_curve_and_two_intervals_make_two_lines(tmp_path: Path) -> None:
    record = tracker(tmp_path / "one", wandb="offline")
    record.log_final(final_result([sweep_row("model", 2.0, 100, 3.0)]))
    record.close()
    _, history, summary, _ = recorded(tmp_path / "one")
    assert history == []
    assert summary["fid"] == 3.0
    record = tracker(tmp_path / "two", wandb="offline")
    record.log_final(final_result([sweep_row("model", 2.0, 100, 3.0), sweep_row("model", 2.0, 100, 4.0, low=0.2)]))
    record.close()
    _, _, summary, folder = recorded(tmp_path / "two")
    curve = json.loads((folder / "files" / summary["fid_over_guidance_table.path"]).read_text())
    assert [row[1:] for row in curve["data"]] == [["model, 0.1:1", 3.0], ["model, 0.2:1", 4.0]]


def test_the_curve_is_named_after_the_swept_guidance(tmp_path: Path) -> None:
    """A curve over internal guidance must not appear under the key of classifier-free guidance."""
    rows = [{**sweep_row("model", 2.0, 100, 9 - w), "internal_guidance": w} for w in (1.0, 1.4)]
    record = tracker(tmp_path, wandb="offline")
    record.log_final(final_result(rows))
    record.close()
    _, _, summary, folder = recorded(tmp_path)
    assert "fid_over_guidance_table.path" not in summary
    curve = json.loads((folder / "files" / summary["fid_over_internal_guidance_table.path"]).read_text())
    assert curve["data"] == [[1.0, "model", 8.0], [1.4, "model", 7.6]]


def test_the_lines_of_a_sweep_run_along_internal_guidance() -> None:
    """If guidance is swept too, the lines run along guidance, and internal guidance names the lines."""
    inner = {"internal_interval": [0.0, 0.8]}
    rows = [{**sweep_row("model", 2.0, 100, 9 - w), "internal_guidance": w, **inner} for w in (1.4, 1.0, 1.8)]
    along, lines = sweep_lines([*rows, {**sweep_row("model", 2.0, 500, 1.0), "internal_guidance": 1.8, **inner}])
    assert along == "internal_guidance"
    assert {name: [row[along] for row in line] for name, line in lines.items()} == {"model": [1.0, 1.4, 1.8]}
    along, lines = sweep_lines([*rows, {**rows[0], "guidance_scale": 1.0, "internal_interval": [0.0, 1.0]}])
    assert along == "guidance_scale"
    assert list(lines) == [
        *("model, internal 1.4, internal in 0:0.8", "model, internal 1.0, internal in 0:0.8"),
        *("model, internal 1.8, internal in 0:0.8", "model, internal 1.4, internal in 0:1"),
    ]
    assert sweep_lines([sweep_row("model", 1.0, 100, None)]) == ("guidance_scale", {})
    other = [{("fd_dinov2" if key == "fid" else key): value for key, value in row.items()} for row in rows]
    assert list(sweep_lines(other)[1]) == list(sweep_lines(rows)[1]), "the distance of a network that gives no FID"
    assert distance_of({"num_images": 1, "fd_dinov2": 1.0, "fd_dinov2_floor": 0.5, "fd_inception": 2.0}) == "fd_dinov2"
    assert distance_of({"fd_dinov2": 1.0, "fid": 2.0}) == "fid"


def test_secrets_are_in_no_file_of_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = "https://anna:p4ss@host/x-{0..3}.tar?token=p4ss"
    words = ["train.py", "--config=a.yaml", f"data.shards={address}", address]
    monkeypatch.setattr(sys, "argv", words)
    config = Config(data=DataConfig(shards=address), tracking=TrackingConfig(wandb="offline"))
    record = Tracker(config, tmp_path, True, 0)
    assert sys.argv is words
    assert words[3] == address, "the process keeps its arguments"
    record.log({"step": 1, "images": 8})
    record.log_final(final_result([sweep_row("model", 1.0, 100, 3.0), sweep_row("model", 2.0, 100, 2.0)]))
    record.close()
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert path in files
    assert not [file for file in files if b"p4ss" in file.read_bytes()]
    hidden = "https://***@host/x-{0..3}.tar?token=***"
    known = [list(record.environment.args) for record in records(path) if record.HasField("environment")]
    assert ["--config=a.yaml", f"data.shards={hidden}", hidden] in known


@pytest.mark.parametrize(
    ("environment", "files", "said"),
    [
        ({}, {}, r"no API key for https://\S+\. Run `wandb login`, set WANDB_API_KEY, or set tracking.wandb=offline"),
        ({"WANDB_API_KEY": KEY}, {}, None),
        ({"WANDB_API_KEY": "short"}, {}, r"WANDB_API_KEY invalid: .*40.* Run `wandb login`"),
        ({"WANDB_IDENTITY_TOKEN_FILE": "token"}, {}, None),
        ({"WANDB_API_KEY": KEY, "WANDB_IDENTITY_TOKEN_FILE": "token"}, {}, "Both WANDB_API_KEY and"),
        ({"WANDB_BASE_URL": "http://127.0.0.1:9"}, {"netrc": f"machine 127.0.0.1:9 login user password {KEY}"}, None),
        ({}, {"netrc": f"machine 127.0.0.1:9 login user password {KEY}"}, "no API key for"),
        ({}, {"settings": f"[default]\napi_key = {KEY}"}, None),
        ({"WANDB_MODE": "offline"}, {}, None),
        ({"WANDB_MODE": "disabled"}, {}, None),
        ({"WANDB_MODE": "nonsense"}, {}, "mode Input should be 'online', 'offline'"),
    ],
)
def test_a_missing_key_is_refused(
    no_wandb_settings: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    files: dict[str, str],
    said: str | None,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for name, text in files.items():
        (no_wandb_settings / name).write_text(text)
    online = Config(tracking=TrackingConfig(wandb="online"))
    if said is None:
        check_wandb(online)
        return
    with pytest.raises(ConfigError, match=said) as refused:
        check_wandb(online)
    assert "\n" not in str(refused.value)
    for other in ("off", "offline"):
        check_wandb(Config(tracking=TrackingConfig(wandb=other)))


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_the_mode_of_the_environment_overrides_the_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, mode: str
) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    record = tracker(tmp_path, wandb="online")
    record.log({"step": 1, "images": 8})
    record.log_final(final_result([]))
    record.close()
    assert len(list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))) == (mode == "offline")
    assert "its own settings (WANDB_MODE) disable it" in caplog.text
    assert "W&B failed" not in caplog.text


def test_a_second_record_keeps_the_file_of_the_first_one(tmp_path: Path) -> None:
    """A sweep records next to the training: the training's file is read while it grows.

    An incomplete line is left out.
    """
    training = tracker(tmp_path)
    training.log({"step": 1})
    tracker(tmp_path, resumed_step=None).close()
    training.log({"step": 2})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


def test_if_wandb_cannot_start_the_record_is_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    caplog.set_level("INFO")
    record = tracker(tmp_path, wandb="online")
    record.log({"step": 1, "images": 8, "loss": 1.0})
    record.close()
    assert len(read_metrics(tmp_path)) == 1
    assert list((tmp_path / "wandb").glob("offline-run-*"))
    assert "W&B failed (ConfigError: tracking.wandb=online: no API key" in caplog.text
    assert f"wandb sync {tmp_path}/wandb/offline-run-*" in caplog.text


def test_an_unreadable_id_does_not_stop_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "wandb_id").mkdir()
    record = tracker(tmp_path, wandb="offline")
    record.log({"step": 1, "images": 8})
    record.close()
    assert len(read_metrics(tmp_path)) == 1
    assert "W&B failed (IsADirectoryError" in caplog.text


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"a/b", b"x" * 65])
def test_a_damaged_id_is_replaced(tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "wandb_id"
    path.write_bytes(content)
    new = _own_id(path)
    assert len(new) == 8
    assert path.read_text() == new == _own_id(path)
    assert ("damaged, not an id of W&B" in caplog.text) == bool(content)


def test_the_id_of_a_sweep_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep123")
    monkeypatch.setenv("WANDB_RUN_ID", "ofsweep1")
    tracker(tmp_path, wandb="offline").close()
    own = (tmp_path / "wandb_id").read_text()
    assert f"W&B records under the id ofsweep1 of its sweep, not under {own} of RUN/wandb_id" in caplog.text


def test_a_picture_that_wandb_refuses_does_not_stop_training(
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


def test_a_table_that_wandb_refuses_does_not_stop_the_evaluation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = tracker(tmp_path, wandb="offline")
    record.log_final(final_result([sweep_row("model", 1.0, 100, 3.0), {"weights": object()}]))
    record.close()
    assert "W&B failed" in caplog.text


class Refusing(BaseHTTPRequestHandler):
    """A server that knows no key."""

    def do_POST(self) -> None:
        body = b'{"errors": [{"message": "user is not logged in"}]}'
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def test_if_the_server_refuses_the_key_the_record_is_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    record = tracker(tmp_path, wandb="online")
    record.log({"step": 1, "images": 8, "loss": 1.0})
    record.close()
    server.shutdown()
    server.server_close()
    assert "W&B failed (" in caplog.text
    assert "401" in caplog.text
    assert "W&B records offline from now on" in caplog.text
    assert [line["step"] for line in recorded(tmp_path)[1]] == [1]


@pytest.mark.slow
def test_an_unreachable_server_does_not_stop_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    record = tracker(tmp_path, wandb="online")
    record.log({"step": 1, "images": 8, "loss": 1.0})
    record.close()
    assert len(read_metrics(tmp_path)) == 1
    assert list((tmp_path / "wandb").glob("offline-run-*"))
