"""What a run watches: signals, skipped steps, bad samples, losses by noise level, spikes, rate, slow or hung ranks."""

import faulthandler
import logging
import math
import os
import signal
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import torch
from tqdm import tqdm

from jitscale import parallel
from jitscale.errors import INTERRUPTED, DataError, ExitCode, StopRequestedError

logger = logging.getLogger(__name__)


class StopSignal:
    """Notes the signals that ask the process to stop: schedulers' SIGTERM, SIGUSR1 and SIGUSR2, and Ctrl-C's SIGINT.

    The ranks look between two steps. The kernel obeys a second Ctrl-C at once: no collective holds it up.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)

    def __init__(self) -> None:
        self.received = self.interrupted = False  # interrupted: by Ctrl-C
        self._saved_step: int | None = None  # while a signal may end the process
        self._previous = {number: signal.signal(number, self._note) for number in self.SIGNALS}

    @contextmanager
    def exit_on_signal(self, saved_step: int) -> Iterator[None]:
        """Everything is saved: in the body of the `with` statement a signal, also one that was noted, ends the process.

        The exit code is `code`. Afterwards signals are noted again.
        """
        self._saved_step = saved_step
        if self.received:
            self._exit(saved_step)
        try:
            yield
        finally:
            self._saved_step = None

    def check(self) -> None:
        """Raise a StopRequestedError if a signal has come."""
        if self.received:
            raise StopRequestedError("a signal asks to stop; the measurement is left")

    def said(self, saved_step: int) -> str:
        """How the run ends after a signal, in a line for the user."""
        by = "stopped by Ctrl-C" if self.interrupted else "a signal asked to stop"
        return f"{by}: saved at step {saved_step}; the same command goes on from there"

    @property
    def code(self) -> int:
        """The exit code of a process that was asked to stop, and has saved."""
        return INTERRUPTED if self.interrupted else ExitCode.REQUEUE

    def restore(self) -> None:
        """Put the former handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        if number == signal.SIGINT:
            self.interrupted = True
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self._saved_step is not None:
            self._exit(self._saved_step)
        if self.interrupted:
            self._say("Ctrl-C: the run saves and stops; a second Ctrl-C ends it at once")

    def _exit(self, saved_step: int) -> None:
        self._say(self.said(saved_step))
        os._exit(self.code)

    def _say(self, line: str) -> None:
        if parallel.this_rank() == 0:  # past the buffers, in whose midst the signal may have come
            os.write(2, f"\n{line}\n".encode())


class StepOutcomes:
    """Whether steps moved the weights; on GPUs read some steps later, since the host would wait for the newest one."""

    LATE = 2  # steps

    def __init__(self, device: torch.device) -> None:
        self._late = self.LATE if device.type == "cuda" else 0
        self._unread: deque[tuple[torch.Tensor, torch.cuda.Event | None]] = deque()

    def add(self, moved: torch.Tensor) -> list[bool]:
        """Note the last step's boolean (); returns the outcomes that are old enough to be read, oldest first."""
        copied = None
        if moved.device.type == "cuda":
            moved = moved.to("cpu", non_blocking=True)
            copied = torch.cuda.current_stream().record_event()
        self._unread.append((moved, copied))
        return self.settle(self._late)

    def settle(self, leave: int = 0) -> list[bool]:
        """All that were not read yet, but the `leave` newest; may wait for the device."""
        found = []
        while len(self._unread) > leave:
            moved, copied = self._unread.popleft()
            if copied is not None:
                copied.synchronize()
            found.append(bool(moved))
        return found


class BadSamples:
    """Counts the images that could not be decoded, and ends the run on all ranks if they are too many."""

    ALWAYS_ALLOWED = 10

    def __init__(self, fraction: float) -> None:
        """`fraction` of the images seen is allowed."""
        self._fraction = fraction
        self._before = 0  # counted by all ranks until the checkpoint that this process began from
        self.here = 0  # counted by this rank since then
        self._reasons: list[str] = []

    def begin_again(self, before: int) -> None:
        """Count from a checkpoint that has counted `before`."""
        self._before, self.here = before, 0

    def note(self, reasons: list[str]) -> None:
        """Count this rank's bad samples, and say what is wrong with the first ones."""
        self.here += len(reasons)
        for reason in reasons[: self.ALWAYS_ALLOWED - len(self._reasons)]:
            self._reasons.append(reason)
            logger.warning("%s; another sample stands in for it", reason)

    def total(self) -> int:
        """Over all ranks since the beginning of the run; a collective call."""
        return self._before + int(parallel.tally(torch.tensor([self.here]))[0])

    def check(self, here: int, images: int) -> int:
        """The total after `images` images, where all ranks together have counted `here`; a collective call.

        Raises a DataError on every rank if it is more than `ALWAYS_ALLOWED` and more than the allowed fraction.
        """
        total = self._before + here
        if total > max(self.ALWAYS_ALLOWED, self._fraction * images):
            reasons = [reason for rank in parallel.gather_objects(self._reasons[:3]) for reason in rank]
            what = f"data.max_bad_fraction={self._fraction:g}: {total} of {images} images could not be decoded"
            remedy = "Check the shards with tools/index_shards.py --verify, or raise the limit"
            raise DataError(f"{what}, such as {'; '.join(reasons[:3])}. {remedy}")
        return total


class LossByNoiseLevel:
    """The mean loss in ten equal intervals of t since the last log point, kept on the device."""

    BINS = 10

    def __init__(self, device: torch.device) -> None:
        self._sums_and_counts = torch.zeros(2, self.BINS, device=device)

    def add(self, t: torch.Tensor, losses: torch.Tensor) -> None:
        """Count the `losses` (B,) of samples at times `t` (B,)."""
        bins = (t * self.BINS).long().clamp(0, self.BINS - 1)
        sums, counts = self._sums_and_counts
        sums.index_add_(0, bins, losses.detach().float())
        counts.index_add_(0, bins, torch.ones_like(losses, dtype=torch.float32))

    def take(self) -> torch.Tensor:
        """This rank's sums and counts, (2 * BINS,); the next ones begin at zero."""
        taken = self._sums_and_counts.flatten().clone()
        self._sums_and_counts.zero_()
        return taken

    @classmethod
    def means(cls, taken: Sequence[float]) -> dict[str, float | None]:
        """`loss_t0` for t in [0, 0.1), ..., None where there was no sample, from the ranks' summed `take`."""
        pairs = enumerate(zip(taken[: cls.BINS], taken[cls.BINS :], strict=True))
        return {f"loss_t{k}": total / count if count else None for k, (total, count) in pairs}


class LossSpikes:
    """Finds a loss that is far above the last ones."""

    LEAST, MOST = 20, 100  # logged losses to compare with
    DEVIATIONS = 10.0

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=self.MOST)

    def record(self, loss: float) -> bool:
        """Keep `loss`; returns whether it is a spike.

        A spike lies more than `DEVIATIONS` robust standard deviations above the median of the last losses. The robust
        standard deviation is 1.4826 times the median absolute deviation, which spikes do not widen.
        """
        if not math.isfinite(loss):
            return False  # such a step is skipped, and counted elsewhere
        spike = False
        if len(self._losses) >= self.LEAST:
            median = statistics.median(self._losses)
            spread = 1.4826 * statistics.median(abs(other - median) for other in self._losses)
            spike = loss > median + self.DEVIATIONS * max(spread, 1e-3 * abs(median))
        self._losses.append(loss)
        return spike


class RankTimes:
    """Compares the ranks by the time until their first collective of a step: waiting for data, and the forward pass.

    A whole step takes equally long on all ranks, since they wait for the slowest. In ZeRO stage 3 the forward pass has
    collectives too, so only the waiting for data differs there.
    """

    FACTOR = 1.5  # of the median
    LEAST_SECONDS = 0.01  # less than this is noise

    def __init__(self, device: torch.device, parts: int) -> None:
        """`parts` are measured in a step."""
        self._on_gpu = device.type == "cuda"
        self._parts_in_step, self._parts = parts, 0
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def part(self) -> Iterator[None]:
        """Measure the body of the `with` statement; on a GPU without waiting for it."""
        started = time.perf_counter()
        self._parts += 1
        if self._on_gpu:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            yield
            self._seconds += time.perf_counter() - started

    def take(self) -> float:
        """This rank's seconds a step over the steps since the last call."""
        for begin, end in self._events:
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1e3
        mine = self._seconds * self._parts_in_step / max(1, self._parts)
        self._seconds, self._parts, self._events = 0.0, 0, []
        return mine

    @classmethod
    def slow_ranks(cls, everyone: Sequence[float]) -> list[tuple[int, float, float]]:
        """(rank, its seconds a step, the median over ranks) of ranks that are much slower than the median."""
        median = statistics.median_low(everyone)
        limit = max(cls.FACTOR * median, median + cls.LEAST_SECONDS)
        return [(rank, seconds, median) for rank, seconds in enumerate(everyone) if seconds > limit]


class Clock:
    """Images a second between log points, without the time spent on saves, measurements and pictures."""

    def __init__(self, images: int) -> None:
        """`images` seen already."""
        self.bar: tqdm[Any] | None = None  # its time left does not count that time either
        self.restart(images)

    def restart(self, images: int) -> None:
        """Count from here."""
        self._began, self._images = time.perf_counter(), images

    @contextmanager
    def stopped(self, doing: str = "save") -> Iterator[None]:
        """The body of the `with` statement does not count; meanwhile the bar says what the run is `doing`."""
        stopped, bar = time.perf_counter(), None if self.bar is None or self.bar.disable else self.bar
        if bar is not None:
            usual = bar.desc
            bar.set_description_str(doing)
        try:
            yield
        finally:
            seconds = time.perf_counter() - stopped
            self._began += seconds
            if bar is not None:
                bar.start_t, bar.last_print_t = bar.start_t + seconds, bar.last_print_t + seconds
                bar.set_description_str(usual)

    def take_rate(self, images: int) -> float:
        """Images a second since the last call or restart."""
        rate = (images - self._images) / (time.perf_counter() - self._began)
        self.restart(images)
        return rate


class HangWatch:
    """Ends the process if `alive()` was not called for `seconds`, and leaves the stacks of all its threads.

    A rank that waits in a collective for a dead rank would wait for ever, and the job would pay for it. The watch is a
    thread that counts its own wake-ups: while the process is suspended (SIGSTOP, `scontrol suspend`) it does not wake
    up, and the count goes on afterwards. It needs the interpreter's lock, which collectives, reads and waits for a GPU
    release. A rank that hangs with the lock is ended by its launcher, when the watches of the ranks that wait for it
    have ended those.
    """

    WAKE_UPS = 20  # within `seconds`

    def __init__(self, seconds: float, stacks: Path) -> None:
        """Append stacks to the file `stacks`, after those of earlier hangs; `seconds` of 0 watch nothing."""
        self._seconds, self._path = seconds, stacks
        self._file = stacks.open("a") if seconds > 0 else None
        self._signs, self._paused = 0, True  # signs of life
        self._closed = threading.Event()
        if self._file is not None:
            threading.Thread(target=self._watch, args=(self._file,), name="hang watch", daemon=True).start()

    def alive(self) -> None:
        """Count from here."""
        self._signs, self._paused = self._signs + 1, False

    def pause(self) -> None:
        """Stop counting until the next `alive()`."""
        self._paused = True

    def close(self) -> None:
        """Stop, and remove the file if it is empty."""
        self._closed.set()
        if self._file is not None:
            self._file.close()
            if self._path.exists() and self._path.stat().st_size == 0:
                self._path.unlink()

    def _watch(self, file: TextIO) -> None:
        signs = wake_ups = 0
        while not self._closed.wait(self._seconds / self.WAKE_UPS):
            wake_ups = 0 if self._paused or signs != self._signs else wake_ups + 1
            signs = self._signs
            if wake_ups >= self.WAKE_UPS:
                try:
                    file.write(f"Timeout: no step for {self._seconds:g} s\n")
                    file.flush()
                    faulthandler.dump_traceback(file)
                finally:  # also on a full disk
                    os._exit(ExitCode.FAILED)
