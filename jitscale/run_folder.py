"""Who may write into a run's folder, what its starts have led to, and how it says there that it is complete.

A scheduler's exit codes prove no completion: srun may return 0 although a node died, where the ranks that were left had
nothing to do any more.
"""

import hashlib
import json
import logging
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path

from jitscale import parallel
from jitscale.config import Config, to_yaml
from jitscale.errors import UserError
from jitscale.files import NO_LOCKS, atomic_write, exclusive

MOST_WITHOUT_PROGRESS = 5  # starts

logger = logging.getLogger(__name__)


def claim(run_dir: Path, held: ExitStack) -> None:
    """Lock the run's folder until `held` is closed; a collective call.

    Raises a UserError on every rank if another process is at work there, or it cannot be written.
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


@dataclass
class Attempts:
    """The record of a run's starts; kept as attempts.json in its folder."""

    starts: int = 0
    position: int = -1  # the progress mark at the last start: saved steps and finished parts of evaluations
    without_progress: int = 0  # starts in a row that found the run where the one before had found it
    excluded: list[str] = field(default_factory=list)  # nodes that have failed, which the run keeps away from
    last_reason: str = ""  # why the last start ended

    @classmethod
    def begin(cls, run_dir: Path, position: int, most: int = MOST_WITHOUT_PROGRESS) -> "Attempts":
        """Count a start of the run in `run_dir` at `position`, and keep the record.

        Raises a UserError if the last `most` starts have not moved the run; a further start begins anew.
        """
        path = run_dir / "attempts.json"
        now = cls(**json.loads(path.read_text())) if path.exists() else cls()
        now.without_progress = now.without_progress + 1 if position == now.position else 0
        now.starts, now.position = now.starts + 1, position
        stuck = now.without_progress >= most
        if stuck:
            now.without_progress, now.position = 0, -1
        now.write(run_dir)
        if stuck:
            beyond = f"{position} ({now.last_reason})" if now.last_reason else position
            what = f"{run_dir}: {most} starts in a row have not brought the run beyond {beyond}"
            remedy = "look at the log above, save more often (checkpoint.every_images), or give it more time"
            raise UserError(f"{what}, counted in saved steps and evaluated parts; {remedy}")
        return now

    def write(self, run_dir: Path) -> None:
        """Keep the record."""
        run_dir.mkdir(parents=True, exist_ok=True)
        with atomic_write(run_dir / "attempts.json") as file:
            file.write(json.dumps(asdict(self)).encode())

    def exclude(self, nodes: list[str]) -> list[str]:
        """Keep away from `nodes`; returns those that are new."""
        new = [node for node in dict.fromkeys(nodes) if node not in self.excluded]
        self.excluded += new
        return new


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
