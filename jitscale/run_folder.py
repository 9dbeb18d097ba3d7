"""The lock of a run's folder, the record of its starts, and the marker that the run is complete.

srun can return 0 after a node failure, if the other ranks had already finished. So the run records its own end.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import IO

from jitscale import parallel
from jitscale.config import Config, to_yaml
from jitscale.errors import ExitCode, StorageError, UserError, first_line
from jitscale.files import NO_LOCKS, atomic_write, exclusive

MOST_WITHOUT_PROGRESS = 5  # starts

logger = logging.getLogger(__name__)


@dataclass
class Claim:
    """The right of this process to write into a run's folder: a lock, which rank 0 holds until `held` is closed."""

    run_dir: Path
    held: ExitStack = field(default_factory=ExitStack)
    _lock: IO[str] | None = None  # None on other ranks, and on file systems without locks

    def take_again(self) -> None:
        """Lock the folder; if it was removed, create it again.

        Raises a UserError if another process works in the folder, a StorageError if the folder cannot be written.
        """
        run_dir = self.run_dir
        if self._lock is not None and not self.is_lost():
            return
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            lock = exclusive(run_dir / ".lock", "and two runs would overwrite each other")
            self._lock = self.held.enter_context(lock)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                what = f"run.dir={run_dir}: cannot be written ({error}); choose another folder"
                raise StorageError.of(error, what) from error
            logger.warning("run.dir=%s: no locks on this file system (%s); start no second run there", run_dir, error)

    def is_lost(self) -> bool:
        """True if the folder or its lock file was removed, moved or replaced."""
        if self._lock is None:
            return False
        try:
            return not os.path.samestat((self.run_dir / ".lock").stat(), os.fstat(self._lock.fileno()))
        except (FileNotFoundError, NotADirectoryError):
            return True


def claim(run_dir: Path, held: ExitStack) -> Claim:
    """Lock the run's folder until `held` is closed; a collective call.

    Raises a UserError on every rank if another process works in the folder, or if it cannot be written.
    """
    claimed = Claim(run_dir, held)
    parallel.on_main(claimed.take_again)
    return claimed


def after_the_end(finish: Callable[[], object]) -> ExitCode:
    """Do the work after the last save. If the storage fails, log it and return FAILED. A collective call."""
    try:
        finish()
    except StorageError as error:
        if parallel.this_rank() == 0:
            logger.error("error: %s; the trained state is saved; start the same command again to do the rest", error)
        return ExitCode.FAILED
    return ExitCode.DONE


@dataclass
class Attempts:
    """The record of a run's starts; kept as attempts.json in its folder."""

    starts: int = 0
    position: int = -1  # progress mark at the last start: saved steps and finished parts of evaluations
    without_progress: int = 0  # starts in a row that found the run at an unchanged position
    excluded: list[str] = field(default_factory=list)  # nodes that have failed; the next start avoids them
    last_reason: str = ""  # why the last start ended

    @classmethod
    def begin(cls, run_dir: Path, position: int, most: int = MOST_WITHOUT_PROGRESS) -> "Attempts":
        """Count a start of the run in `run_dir` at `position`, and write the record.

        Raises a UserError if the last `most` starts brought no progress. The count is then reset, so that a manual
        restart begins with zero.
        """
        now = cls.read(run_dir)
        now.without_progress = now.without_progress + 1 if position == now.position else 0
        now.starts, now.position = now.starts + 1, position
        stuck = now.without_progress >= most
        if stuck:
            now.without_progress, now.position = 0, -1
        now.write(run_dir)
        if stuck:
            beyond = f"{position} ({now.last_reason})" if now.last_reason else position
            what = f"{run_dir}: {most} starts in a row brought no progress beyond {beyond}"
            remedy = "look at the log above, save more often (checkpoint.every_images), or raise the time limit"
            raise UserError(f"{what}, counted in saved steps and evaluated parts; {remedy}")
        return now

    @classmethod
    def read(cls, run_dir: Path) -> "Attempts":
        """The record in `run_dir`; a new one if there is none or it is damaged."""
        path = run_dir / "attempts.json"
        try:
            kept = cls(**json.loads(path.read_bytes()))
            numbers = (kept.starts, kept.position, kept.without_progress)
            names = (*kept.excluded, kept.last_reason) if isinstance(kept.excluded, list) else (None,)
            if all(type(n) is int for n in numbers) and all(isinstance(name, str) for name in names):
                return kept
            reason = "its values have other types"
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, TypeError, RecursionError) as error:
            reason = first_line(error)
        logger.warning("%s: damaged (%s); the count of starts begins again", path, reason)
        return cls()

    def write(self, run_dir: Path) -> None:
        """Write the record into `run_dir`."""
        run_dir.mkdir(parents=True, exist_ok=True)
        with atomic_write(run_dir / "attempts.json") as file:
            file.write(json.dumps(asdict(self)).encode())

    def exclude(self, nodes: list[str]) -> list[str]:
        """Exclude `nodes` from further starts; returns the nodes that were not excluded before."""
        new = [node for node in dict.fromkeys(nodes) if node not in self.excluded]
        self.excluded += new
        return new


def mark_complete(run_dir: Path, command: str, config: Config | None = None) -> None:
    """Record that `command` (train, evaluate) is complete in `run_dir`, under `config`."""
    run_dir.mkdir(parents=True, exist_ok=True)
    time = datetime.now(timezone.utc).isoformat(timespec="seconds")
    with atomic_write(_marker(run_dir, command)) as file:
        file.write(json.dumps({"time": time, "config": None if config is None else _digest(config)}).encode())


def is_complete(run_dir: Path, command: str) -> bool:
    """True if `command` has become complete since the last `forget_completion`."""
    return _marker(run_dir, command).exists()


def is_complete_under(config: Config) -> bool:
    """True if training under exactly this configuration is complete, and its results exist.

    Under another configuration (more images, another sweep) there is work left.
    """
    run_dir = Path(config.run.dir)
    try:
        recorded = json.loads(_marker(run_dir, "train").read_text())
    except (OSError, ValueError, RecursionError):
        return False
    left = (not config.evaluation.at_end or (run_dir / "result.json").exists()) and (run_dir / "checkpoints").exists()
    return left and isinstance(recorded, dict) and recorded.get("config") == _digest(config)


def forget_completion(run_dir: Path, command: str) -> None:
    """Clear the marker of an earlier run of `command`."""
    _marker(run_dir, command).unlink(missing_ok=True)


def _digest(config: Config) -> str:
    same = replace(config, run=replace(config.run, profile=False))  # run.profile adds no work to a finished run
    return hashlib.sha256(to_yaml(same).encode()).hexdigest()


def _marker(run_dir: Path, command: str) -> Path:
    return run_dir / f"complete_{command}.json"
