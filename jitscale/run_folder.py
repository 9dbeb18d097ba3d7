"""Who may write into a run's folder, and how a run says there that it is complete.

A scheduler's exit codes prove no completion: srun may return 0 although a node died, where the ranks that were left had
nothing to do any more.
"""

from __future__ import annotations

import hashlib
import json
import logging
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

from jitscale import parallel
from jitscale.config import Config, to_yaml
from jitscale.errors import UserError
from jitscale.files import NO_LOCKS, atomic_write, exclusive

logger = logging.getLogger(__name__)


def claim(run_dir: Path, held: ExitStack) -> None:
    """Lock the run's folder until `held` is closed; a collective call.

    Raises:
        UserError: on every rank: another process is at work there, or it cannot be written.
    """

    def lock() -> None:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            held.enter_context(exclusive(run_dir / ".lock", "and two runs would overwrite each other"))
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise UserError(f"run.dir={run_dir}: cannot be written ({error}); choose another folder") from error
            logger.warning("run.dir=%s: no locks here (%s); take care that no second run uses it", run_dir, error)

    parallel.on_main(lock)


def mark_complete(run_dir: Path, command: str, config: Config | None = None) -> None:
    """Record that `command` (train, evaluate) has come to its end in `run_dir`, under `config`."""
    run_dir.mkdir(parents=True, exist_ok=True)
    time = datetime.now(timezone.utc).isoformat(timespec="seconds")
    with atomic_write(_marker(run_dir, command)) as file:
        file.write(json.dumps({"time": time, "config": None if config is None else _digest(config)}).encode())


def is_complete(run_dir: Path, command: str) -> bool:
    """Whether `command` has come to its end since the last `forget_completion`."""
    return _marker(run_dir, command).exists()


def is_complete_under(config: Config) -> bool:
    """Whether training under exactly this configuration has come to its end, and its results are there.

    Another configuration (more images, another sweep) has something left to do.
    """
    run_dir = Path(config.run.dir)
    try:
        recorded = json.loads(_marker(run_dir, "train").read_text())
    except (OSError, ValueError):
        return False
    left = (not config.evaluation.at_end or (run_dir / "result.json").exists()) and (run_dir / "checkpoints").exists()
    return left and isinstance(recorded, dict) and recorded.get("config") == _digest(config)


def forget_completion(run_dir: Path, command: str) -> None:
    """Clear the marker of an earlier run of `command`."""
    _marker(run_dir, command).unlink(missing_ok=True)


def _digest(config: Config) -> str:
    same = replace(config, run=replace(config.run, profile=False))  # to profile a finished run leaves nothing to do
    return hashlib.sha256(to_yaml(same).encode()).hexdigest()


def _marker(run_dir: Path, command: str) -> Path:
    return run_dir / f"complete_{command}.json"
