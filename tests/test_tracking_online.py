"""W&B online, on a local server with W&B's protocol. `make test-wandb` installs the server and runs this file."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT

SERVER = ROOT / ".venv-wandb-server/bin/openwandb"
KEY = "local" + "0" * 40  # the key of the server's first user

pytestmark = pytest.mark.wandb

LIFE = """
import logging, os, signal, sys, time
from pathlib import Path
import numpy as np
from jitscale import tracking
from jitscale.config import Config, TrackingConfig
logging.basicConfig(level=logging.INFO, format="%(message)s")
run_dir, last, until, end = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
record = tracking.Tracker(Config(tracking=TrackingConfig(wandb="online", project="tests")), run_dir, True, last)
assert record._offline == (end == "offline")
for step in range(last + 1, until + 1):
    record.log({"step": step, "images": 8 * step, "loss": 1 / step})
record.log_image(tracking.SAMPLES, np.full((4, 6, 3), until, np.uint8), 8 * until)
if end == "killed":
    time.sleep(25)  # W&B sends every 15 seconds
    os.kill(os.getpid(), signal.SIGKILL)
if end == "without its server":
    os.kill(int(sys.argv[5]), signal.SIGTERM)
    time.sleep(2)
    record.log({"step": until + 1, "images": 8 * until + 8, "loss": 0.0})
if end == "done":
    rows = [
        {"weights": w, "guidance_scale": g, "guidance_interval": [0.1, 1.0], "num_images": 100, "fid": 9 - g,
         "inception_score": g} for w in ("model", "ema_0.9") for g in (1.0, 2.0)
    ]
    best = {name: rows[-1][name] for name in ("weights", "guidance_scale", "guidance_interval")}
    record.log_final({"fid": 7.0, "inception_score": 2.0, "best": best, "table": rows})
start = time.monotonic()
record.close()
print("closed in", time.monotonic() - start)
"""


class Server:
    """The process of the server, and the runs that it has stored."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.start()

    def start(self) -> None:
        command = [
            str(SERVER),
            "serve",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--data-dir",
            str(self.folder),
        ]
        with (self.folder / "server.log").open("a") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, "HOME": str(self.folder)}
            )
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                assert time.monotonic() < deadline, (self.folder / "server.log").read_text()
                time.sleep(0.2)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=30)

    def environment(self, **changes: str) -> dict[str, str]:
        """The environment of a run: nothing from the machine's user; `changes` may replace the key."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
        nowhere = {"NETRC": str(self.folder / "netrc"), "WANDB_CONFIG_DIR": str(self.folder / "settings")}
        own = {"WANDB_BASE_URL": f"http://127.0.0.1:{self.port}", "WANDB_API_KEY": KEY, "PYTHONPATH": str(ROOT)}
        return {**kept, **nowhere, **own, **changes}

    def live(self, run_dir: Path, last: int, until: int, end: str, **changes: str) -> str:
        """Record the steps after `last` up to `until` in a process that ends as `end` says; returns its output."""
        run_dir.mkdir(exist_ok=True)
        words = [str(run_dir), str(last), str(until), end, str(self.process.pid)]
        done = subprocess.run(
            [sys.executable, "-c", LIFE, *words],
            env=self.environment(**changes),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == (-signal.SIGKILL if end == "killed" else 0), done.stdout
        return done.stdout

    def stored(self, run_dir: Path) -> Path:
        """The folder in which the server stores the run's files."""
        return self.folder / "files/default/tests" / (run_dir / "wandb_id").read_text()

    def history(self, run_dir: Path) -> list[dict[str, Any]]:
        lines = (self.stored(run_dir) / "wandb-history.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, lines) if "_wandb" not in line and "step" in line]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.stop()


def test_one_run_through_a_kill_and_a_requeue(server: Server, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    server.live(run_dir, 0, 4, "killed")
    server.live(run_dir, 2, 6, "requeued")
    server.live(run_dir, 6, 8, "done")
    assert len(list(server.stored(run_dir).parent.iterdir())) == 1, "the server has one run"
    stored = server.stored(run_dir)
    history = server.history(run_dir)
    assert [line["step"] for line in history] == [1, 2, 3, 4, 3, 4, 5, 6, 7, 8]
    assert all(line["images"] == 8 * line["step"] and line["loss"] == 1 / line["step"] for line in history)
    assert len(list(stored.glob("media/images/samples_*.png"))) == 3

    summary = json.loads((stored / "wandb-summary.json").read_text())
    assert (summary["fid"], summary["inception_score"], summary["step"]) == (7.0, 2.0, 8)
    best = [summary[f"best/{name}"] for name in ("weights", "guidance_scale", "guidance_interval")]
    assert best == ["ema_0.9", 2.0, "0.1:1"]
    table = json.loads((stored / summary["sweep"]["path"]).read_text())
    assert len(table["data"]) == 4
    curve = json.loads((stored / summary["fid_over_guidance_table"]["path"]).read_text())
    assert curve["data"] == [[1.0, "model", 8.0], [2.0, "model", 7.0], [1.0, "ema_0.9", 8.0], [2.0, "ema_0.9", 7.0]]
    config = (stored / "config.yaml").read_text()
    assert "noise_scale:" in config
    assert "wandb/lineseries/v0" in config


def test_an_offline_record_is_sent_later(server: Server, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    for last, until in ((0, 3), (2, 5)):
        server.live(run_dir, last, until, "offline", WANDB_MODE="offline")
    files = sorted(str(path) for path in (run_dir / "wandb").glob("offline-run-*"))
    sync = [str(Path(sys.executable).with_name("wandb")), "sync", *files]
    subprocess.run(sync, env=server.environment(), check=True, timeout=120)
    assert [line["step"] for line in server.history(run_dir)] == [1, 2, 3, 3, 4, 5]


def test_a_server_that_is_gone_at_the_end(server: Server, tmp_path: Path) -> None:
    """The job must not wait for it beyond its time limit, and nothing is lost."""
    run_dir = tmp_path / "run"
    said = server.live(run_dir, 0, 3, "without its server")
    server.process.wait(timeout=30)
    assert "W&B failed (TimeoutError" in said
    assert float(said.rsplit("closed in", 1)[1]) < 60
    server.start()
    words = said.split("to upload the rest of the record of W&B: ")[1].splitlines()[0].split()
    command = [str(Path(sys.executable).with_name(words[0])), *words[1:]]
    subprocess.run(command, env=server.environment(), check=True, timeout=120)
    assert [line["step"] for line in server.history(run_dir)] == [1, 2, 3, 4]
