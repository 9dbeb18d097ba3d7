"""How a run says that it is complete: a scheduler's exit codes do not prove it.

srun may return 0 although a node died, where the ranks that were left had nothing to do any more.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

from jitscale.config import Config, to_yaml
from jitscale.files import atomic_write


def mark_complete(run_dir: Path, command: str, config: Config | None = None) -> None:
    """Record that `command` (train, evaluate) has come to its end in `run_dir`, under `config`."""
    run_dir.mkdir(parents=True, exist_ok=True)
    time = datetime.now(timezone.utc).isoformat(timespec="seconds")
    with atomic_write(_path(run_dir, command)) as file:
        file.write(json.dumps({"time": time, "config": None if config is None else _digest(config)}).encode())


def is_complete(run_dir: Path, command: str) -> bool:
    """Whether `command` has come to its end since the last `forget_completion`."""
    return _path(run_dir, command).exists()


def is_complete_under(config: Config) -> bool:
    """Whether training under just this configuration has come to its end, and what it has left is there.

    Another configuration (more images, another sweep) has something left to do.
    """
    run_dir = Path(config.run.dir)
    try:
        recorded = json.loads(_path(run_dir, "train").read_text())
    except (OSError, ValueError):
        return False
    left = (not config.evaluation.at_end or (run_dir / "result.json").exists()) and (run_dir / "checkpoints").exists()
    return left and isinstance(recorded, dict) and recorded.get("config") == _digest(config)


def _digest(config: Config) -> str:
    same = replace(config, run=replace(config.run, profile=False))  # to profile a finished run leaves nothing to do
    return hashlib.sha256(to_yaml(same).encode()).hexdigest()


def forget_completion(run_dir: Path, command: str) -> None:
    """Clear the marker of an earlier run of `command`."""
    _path(run_dir, command).unlink(missing_ok=True)


def _path(run_dir: Path, command: str) -> Path:
    return run_dir / f"complete_{command}.json"
