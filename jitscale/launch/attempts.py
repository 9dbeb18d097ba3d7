"""The record of a run's starts: whether they lead anywhere, and which nodes have failed it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from jitscale.errors import UserError
from jitscale.files import atomic_write

MOST_WITHOUT_PROGRESS = 5


@dataclass
class Attempts:
    """What is known of the starts so far; kept as attempts.json in the run's folder.

    Attributes:
        starts: of the run.
        position: how far the run was when it was last started, such as a checkpoint's step.
        without_progress: starts in a row that found the run where the one before had found it.
        excluded: nodes that have failed, which the run keeps away from.
        last_reason: why the last start ended.
    """

    starts: int = 0
    position: int = -1
    without_progress: int = 0
    excluded: list[str] = field(default_factory=list)
    last_reason: str = ""

    @classmethod
    def read(cls, run_dir: Path) -> Attempts:
        """The record of `run_dir`, or an empty one."""
        path = run_dir / "attempts.json"
        return cls(**json.loads(path.read_text())) if path.exists() else cls()

    def write(self, run_dir: Path) -> None:
        """Keep the record."""
        run_dir.mkdir(parents=True, exist_ok=True)
        with atomic_write(run_dir / "attempts.json") as file:
            file.write(json.dumps(asdict(self)).encode())

    def begin(self, position: int, most: int = MOST_WITHOUT_PROGRESS) -> None:
        """Count a start at `position`.

        Raises:
            UserError: the last `most` starts have not moved the run.
        """
        self.without_progress = self.without_progress + 1 if position == self.position else 0
        self.position = position
        self.starts += 1
        if self.without_progress >= most:
            reason = f" ({self.last_reason})" if self.last_reason else ""
            self.without_progress, self.position = 0, -1  # who starts it again by hand has done something about it
            raise UserError(
                f"{most} starts in a row have not brought the run beyond {position}{reason}; look at the log above, "
                "save more often (checkpoint.every_images), or give it more time"
            )

    def exclude(self, nodes: list[str]) -> list[str]:
        """Keep away from `nodes`; returns those that are new."""
        new = [node for node in dict.fromkeys(nodes) if node not in self.excluded]
        self.excluded += new
        return new
