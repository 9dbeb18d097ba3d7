"""Injects faults, so that tests and drills see how a run handles them. Off unless JITSCALE_FAULTS is set.

    JITSCALE_FAULTS="nan:step=5:rank=1,kill:step=7:rank=0"

| kind | effect |
|---|---|
| nan | the rank's loss is NaN |
| kill | SIGKILL ends the process |
| hang | the process sleeps forever |
| slow | the process sleeps for `seconds` |
| unwritable | the rank cannot write its part of the checkpoint |

A fault is injected at `step` (counted from 1) on `rank` (default: every rank). It is repeated in the following steps
until it was injected `times` times (default: 1).
"""

import errno
import logging
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from jitscale.checkpoints.saving import Writer
from jitscale.errors import ConfigError

logger = logging.getLogger(__name__)

VARIABLE = "JITSCALE_FAULTS"
KINDS = ("nan", "kill", "hang", "slow", "unwritable")


@dataclass
class Fault:
    """One entry of the variable."""

    kind: str
    step: int
    rank: int | None = None
    times: int = 1
    seconds: float = 0.0
    injected: int = 0  # number of times so far


class FaultInjection:
    """The faults of one rank."""

    def __init__(self, rank: int) -> None:
        """Read the faults of `rank` from the variable. Raises a ConfigError at an unknown kind or a wrong setting."""
        faults = [_parse(entry) for entry in os.environ.get(VARIABLE, "").split(",") if entry]
        self._faults = [fault for fault in faults if fault.rank in (None, rank)]
        self._due: list[Fault] = []
        if self._faults:
            logger.warning("%s=%s: faults will be injected", VARIABLE, os.environ[VARIABLE])

    def begin_step(self, step: int) -> None:
        """Select the faults that are due in this step."""
        self._due = [fault for fault in self._faults if fault.step <= step and fault.injected < fault.times]
        for fault in self._due:
            fault.injected += 1

    def inject(self) -> None:
        """Kill, hang or delay the process if such a fault is due, once per step."""
        for fault in [fault for fault in self._due if fault.kind in ("kill", "hang", "slow")]:
            self._due.remove(fault)
            if fault.kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(fault.seconds if fault.kind == "slow" else 10**9)

    def writer(self) -> Writer:
        """A function that writes this rank's part of a checkpoint, or fails if that fault is due."""
        return _fail_to_write if self._is_due("unwritable") else save_file

    def loss(self, loss: torch.Tensor) -> torch.Tensor:
        """`loss`, or NaN if that fault is due."""
        return loss * float("nan") if self._is_due("nan") else loss

    def _is_due(self, kind: str) -> bool:
        return any(fault.kind == kind for fault in self._due)


def _fail_to_write(tensors: dict[str, torch.Tensor], file: Path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))


def _parse(entry: str) -> Fault:
    kind, *settings = entry.strip().split(":")
    try:
        values = dict(setting.split("=", 1) for setting in settings)
        step, rank = int(values.pop("step")), int(values.pop("rank")) if "rank" in values else None
        fault = Fault(kind, step, rank, int(values.pop("times", "1")), float(values.pop("seconds", "0")))
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{VARIABLE}: {entry!r} is not a fault ({error}); write nan:step=5:rank=1") from error
    if kind not in KINDS or values:
        kinds = ", ".join(KINDS)
        raise ConfigError(f"{VARIABLE}: {entry!r}: choose a kind ({kinds}) and settings (step, rank, times, seconds)")
    return fault
