"""Where a run's numbers go: metrics.jsonl in its folder, and Weights & Biases if asked for."""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import wandb
from PIL import Image

from jitscale.config import Config, to_dict
from jitscale.files import appearing_whole

logger = logging.getLogger(__name__)

WANDB_TIMEOUT = 30.0  # seconds to wait for the server at the start
HELD_OUT = "held_out/"  # how the numbers of a held-out loss are called
SAMPLES = "samples"  # pictures of a run's samples, and their folder


class Tracker:
    """Writes what rank 0 measures; on the other ranks every method does nothing.

    Losing the connection to W&B, or W&B itself, never stops training: the numbers are in metrics.jsonl first.
    """

    def __init__(self, config: Config, run_dir: Path, active: bool, resumed_step: int | None) -> None:
        """Open the run's record.

        Args:
            config: of the run.
            run_dir: its folder.
            active: whether this is rank 0.
            resumed_step: lines after it are dropped, for those steps will be run again. None: the files are left as
                they are, another process may be writing them.
        """
        self._active = active
        self._wandb: Any = None
        self._offline = False
        self._unwritten = False
        if not active:
            return
        self._path, self._evaluations = run_dir / "metrics.jsonl", run_dir / "evaluations.jsonl"
        if resumed_step is not None:
            _drop_lines_after(self._path, resumed_step)
            _drop_lines_after(self._evaluations, resumed_step)
        self._file = self._path.open("a")
        if config.tracking.wandb != "off":
            self._start_wandb(config, run_dir)

    def log(self, values: dict[str, float | int | None]) -> None:
        """Record the numbers of a step, or of held-out samples after it; what is not finite becomes null."""
        if not self._active:
            return
        clean = {key: _finite(value) for key, value in values.items()}
        self._write(json.dumps(clean) + "\n")
        self._to_wandb({key: value for key, value in clean.items() if value is not None})

    def _write(self, line: str) -> None:
        """To metrics.jsonl; a full disk costs lines, not the run."""
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            self._say_unwritten(error)

    def _say_unwritten(self, error: OSError) -> None:
        if not self._unwritten:
            logger.error("%s: cannot be written (%s); lines will be missing, training goes on", self._path, error)
        self._unwritten = True

    def log_image(self, name: str, image: npt.NDArray[np.uint8], images: int) -> None:
        """Record a picture (height, width, 3) taken after `images` images seen, as a PNG in the run's folder too."""
        if not self._active:
            return
        path = self._path.parent / name / f"images_{images:012d}.png"
        try:
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(image).save(path)
        except OSError as error:
            self._say_unwritten(error)
        if self._wandb is not None:
            self._guarded(lambda: self._wandb.log({name: wandb.Image(image), "images": images}))

    def log_result(self, result: dict[str, Any], step: int, images: int) -> None:
        """Record the numbers of an evaluation after `step` steps, `images` images seen, in evaluations.jsonl."""
        if not self._active:
            return
        numbers = {key: value for key, value in result.items() if isinstance(value, float | int)}
        line = {"step": step, "images": images, "weights": result["protocol"]["weights"], **numbers}
        try:
            with self._evaluations.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            self._say_unwritten(error)
        self._to_wandb({**{f"evaluation/{key}": value for key, value in numbers.items()}, "images": images})

    def log_table(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Send a table; every row has the same columns."""
        if self._wandb is not None and rows:
            table = wandb.Table(columns=[*rows[0]], data=[[row[column] for column in rows[0]] for row in rows])
            self._guarded(lambda: self._wandb.log({name: table}))

    def rewind(self, step: int) -> None:
        """Forget the lines after `step`: those steps will be run again."""
        if self._active:
            self._file.close()
            _drop_lines_after(self._path, step)
            _drop_lines_after(self._evaluations, step)
            self._file = self._path.open("a")

    def close(self) -> None:
        """End the record."""
        if not self._active:
            return
        try:
            self._file.close()
        except OSError as error:
            self._say_unwritten(error)
        if self._wandb is not None:
            self._guarded(self._wandb.finish)
        if self._offline:
            logger.info("to send what W&B has recorded offline: wandb sync %s/wandb/offline-run-*", self._path.parent)

    def _start_wandb(self, config: Config, run_dir: Path) -> None:
        """Begin or continue the run's W&B record under the same id; offline where the server cannot be reached."""
        identity = run_dir / "wandb_id"
        if not identity.exists():
            identity.write_text(secrets.token_hex(4))
        os.environ.setdefault("WANDB_SILENT", "true")

        def start(mode: Literal["online", "offline"]) -> None:
            record = wandb.init(
                project=config.tracking.project,
                name=config.tracking.name or run_dir.name,
                id=identity.read_text(),
                resume="allow",
                dir=run_dir,
                mode=mode,
                config=to_dict(config),
                settings=wandb.Settings(init_timeout=WANDB_TIMEOUT),
            )
            # Steps are not W&B's own counter: that one refuses the steps which a resume repeats.
            record.define_metric("*", step_metric="images")
            self._wandb = record

        if config.tracking.wandb == "online" and not self._guarded(lambda: start("online")):
            logger.warning("W&B goes on offline")
        if self._wandb is None and self._guarded(lambda: start("offline")):
            self._offline = True

    def _to_wandb(self, values: dict[str, Any]) -> None:
        if self._wandb is not None:
            self._guarded(lambda: self._wandb.log(values))

    def _guarded(self, call: Callable[[], object]) -> bool:
        """Call into W&B; whatever it raises, training goes on without it. Returns whether it worked."""
        try:
            call()
        except Exception as error:
            logger.warning("W&B failed (%s: %s); metrics.jsonl goes on", type(error).__name__, error)
            self._wandb = None
            return False
        return True


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl that are about steps."""
    return [line for line in read_lines(run_dir / "metrics.jsonl") if not _is_held_out(line)]


def read_held_out(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl that are about held-out samples; nothing if there is no file."""
    path = run_dir / "metrics.jsonl"
    return [line for line in read_lines(path) if _is_held_out(line)] if path.exists() else []


def _is_held_out(line: dict[str, Any]) -> bool:
    """Whether a line of metrics.jsonl is about held-out samples, and not about a step."""
    return any(key.startswith(HELD_OUT) for key in line)


def read_evaluations(run_dir: Path) -> list[dict[str, Any]]:
    """What was measured while the run trained; nothing if there is no file."""
    path = run_dir / "evaluations.jsonl"
    return read_lines(path) if path.exists() else []


def read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON lines, without those that a kill or a full disk cut short, or that are being written."""
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            logger.warning("%s: a line that was cut short is left out", path)
    return found


def _finite(value: float | int | None) -> float | int | None:
    return value if value is None or math.isfinite(value) else None


def _drop_lines_after(path: Path, step: int) -> None:
    """Remove the lines of steps after `step`, and a last line that a kill cut short."""
    if not path.exists():
        return
    kept = [json.dumps(line) + "\n" for line in read_lines(path) if line["step"] <= step]
    with appearing_whole(path) as file:
        file.write("".join(kept).encode())
