"""What a run watches while it goes on: signals, bad samples, spikes of the loss, slow ranks, ranks that hang."""

from __future__ import annotations

import faulthandler
import logging
import math
import os
import signal
import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

from jitscale import parallel
from jitscale.errors import DataError, ExitCode

logger = logging.getLogger(__name__)


class StopSignal:
    """Notes SIGTERM, SIGUSR1 and SIGUSR2, with which schedulers ask a job to stop.

    Nothing is interrupted: between two steps the ranks agree on whether any of them was asked.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self) -> None:
        self.received = False
        self._previous = {number: signal.signal(number, self._note) for number in self.SIGNALS}

    def exit_at_once(self) -> None:
        """From now on a signal ends the process with the code that asks for a requeue: everything is saved.

        One that has come already does so too.
        """
        for number in self.SIGNALS:
            signal.signal(number, lambda *_: os._exit(ExitCode.REQUEUE))
        if self.received:
            os._exit(ExitCode.REQUEUE)

    @contextmanager
    def exiting_at_once(self) -> Iterator[None]:
        """`exit_at_once` in the body of the `with` statement; afterwards signals are noted again."""
        self.exit_at_once()
        try:
            yield
        finally:
            for number in self.SIGNALS:
                signal.signal(number, self._note)

    def restore(self) -> None:
        """Put the handlers back that were there before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True


class Verdicts:
    """Whether steps moved the weights, read some steps later on GPUs, where the host would wait for the newest one."""

    LATE = 2  # steps

    def __init__(self, device: torch.device) -> None:
        self._late = self.LATE if device.type == "cuda" else 0
        self._unread: deque[tuple[torch.Tensor, torch.cuda.Event | None]] = deque()

    def add(self, moved: torch.Tensor) -> list[bool]:
        """Note the last step's boolean (); returns the verdicts that are old enough to be read, oldest first."""
        copied = None
        if moved.device.type == "cuda":
            moved = moved.to("cpu", non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self._unread.append((moved, copied))
        return self._read(self._late)

    def settle(self) -> list[bool]:
        """All that were not read yet; may wait for the device."""
        return self._read(0)

    def _read(self, leave: int) -> list[bool]:
        found = []
        while len(self._unread) > leave:
            moved, copied = self._unread.popleft()
            if copied is not None:
                copied.synchronize()
            found.append(bool(moved))
        return found


class BadSamples:
    """Counts the images that could not be decoded, and ends the run on all ranks together when they are too many."""

    ALWAYS_ALLOWED = 10

    def __init__(self, fraction: float) -> None:
        """`fraction` of the images seen is allowed."""
        self.fraction = fraction
        self.before = 0  # counted by all ranks until the checkpoint that this process began from
        self._here = 0
        self._reasons: list[str] = []

    def begin_again(self, before: int) -> None:
        """Count from a checkpoint that has counted `before`."""
        self.before, self._here = before, 0

    def note(self, reasons: list[str]) -> None:
        """Count this rank's bad samples, and say what is wrong with the first ones."""
        self._here += len(reasons)
        for reason in reasons[: self.ALWAYS_ALLOWED - len(self._reasons)]:
            self._reasons.append(reason)
            logger.warning("%s; another sample stands in for it", reason)

    def total(self) -> int:
        """Over all ranks since the beginning of the run; a collective call."""
        return self.before + sum(parallel.gather_objects(self._here))

    def check(self, images: int) -> int:
        """The total after `images` images; a collective call.

        Raises:
            DataError: on every rank, when there are more than `ALWAYS_ALLOWED` and more than the allowed fraction.
        """
        total = self.total()
        if total > max(self.ALWAYS_ALLOWED, self.fraction * images):
            reasons = [reason for rank in parallel.gather_objects(self._reasons[:3]) for reason in rank]
            raise DataError(
                f"data.max_bad_fraction={self.fraction:g}: {total} of {images} images could not be decoded, such as "
                f"{'; '.join(reasons[:3])}. Check the shards with tools/index_shards.py --verify, or raise the limit"
            )
        return total


class LossSpikes:
    """Tells a loss that stands far above the last ones."""

    LEAST, MOST = 20, 100  # logged losses to compare with
    DEVIATIONS = 10.0

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=self.MOST)

    def is_spike(self, loss: float) -> bool:
        """Whether `loss` lies more than `DEVIATIONS` robust standard deviations above the median of the last ones.

        The robust standard deviation is 1.4826 times the median absolute deviation, which spikes themselves do not
        widen.
        """
        if not math.isfinite(loss):
            return False  # such steps are skipped and counted by themselves
        spike = False
        if len(self._losses) >= self.LEAST:
            median = statistics.median(self._losses)
            spread = 1.4826 * statistics.median(abs(other - median) for other in self._losses)
            spike = loss > median + self.DEVIATIONS * max(spread, 1e-3 * abs(median))
        self._losses.append(loss)
        return spike


class RankTimes:
    """Compares the ranks by the time until their first collective of a step: waiting for data, and the forward pass.

    The whole step takes equally long everywhere, since the ranks wait for the slowest. In ZeRO stage 3 the forward pass
    itself has collectives, so that only waiting for data tells there.
    """

    FACTOR = 1.5  # of the median
    LEAST_SECONDS = 0.01  # less than this is noise

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def part(self) -> Iterator[None]:
        """Measure the body of the `with` statement; on a GPU without waiting for it."""
        started = time.perf_counter()
        if self._on_gpu:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            yield
            self._seconds += time.perf_counter() - started

    def slow_ranks(self, steps: int) -> list[tuple[int, float, float]]:
        """Those much slower than the median in the `steps` since the last call; a collective call.

        Returns:
            (rank, its seconds a step, the median over ranks)
        """
        for begin, end in self._events:
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1e3
        mine = self._seconds / steps
        self._seconds, self._events = 0.0, []
        everyone = parallel.gather_objects(mine)
        median = statistics.median_low(everyone)
        limit = max(self.FACTOR * median, median + self.LEAST_SECONDS)
        return [(rank, seconds, median) for rank, seconds in enumerate(everyone) if seconds > limit]


class HangWatch:
    """Ends the process when nobody has said for long that it is alive, and leaves the stacks of all its threads.

    A rank that waits in a collective for one that died would wait for ever, and the job would pay for it. The watch is
    a thread of the interpreter's own that needs no lock of Python's.
    """

    def __init__(self, seconds: float, stacks: Path) -> None:
        """
        Args:
            seconds: without a sign of life; 0 for no watch.
            stacks: a file for the stacks.
        """
        self._seconds = seconds
        self._path = stacks
        self._file = stacks.open("a") if seconds > 0 else None  # what an earlier hang has left stays

    def alive(self) -> None:
        """Count from here."""
        if self._file is not None:
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=self._file)

    def pause(self) -> None:
        """Stop counting until the next sign of life."""
        if self._file is not None:
            faulthandler.cancel_dump_traceback_later()

    def close(self) -> None:
        """Stop, and remove the file if it is empty."""
        self.pause()
        if self._file is not None:
            self._file.close()
            if self._path.exists() and self._path.stat().st_size == 0:
                self._path.unlink()
