"""How a run says that it is complete: a scheduler's exit codes do not prove it.

srun may return 0 although a node died, where the ranks that were left had nothing to do any more.
"""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path

from jitscale.files import appearing_whole


def mark_complete(run_dir: Path, command: str, **facts: object) -> None:
    """Record that `command` (train, evaluate) has come to its end in `run_dir`, with some facts about it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with appearing_whole(_path(run_dir, command)) as file:
        file.write(json.dumps({**facts, "time": datetime.now(timezone.utc).isoformat(timespec="seconds")}).encode())


def is_complete(run_dir: Path, command: str) -> bool:
    """Whether `command` has come to its end since the last `forget_completion`."""
    return _path(run_dir, command).exists()


def forget_completion(run_dir: Path, command: str) -> None:
    """Before `command` is started: what an earlier start has recorded does not count."""
    _path(run_dir, command).unlink(missing_ok=True)


def _path(run_dir: Path, command: str) -> Path:
    return run_dir / f"complete_{command}.json"
