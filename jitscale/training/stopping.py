"""Stops a process of a run: on a signal, or if it hangs."""

import faulthandler
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TextIO

from jitscale import parallel
from jitscale.errors import ExitCode, StopRequestedError


class StopSignal:
    """Records the signals that ask the process to stop: SIGTERM, SIGUSR1, SIGUSR2 (schedulers), and SIGINT (Ctrl-C).

    The ranks check the record between two steps. A second Ctrl-C ends the process at once, even inside a collective,
    because SIGINT then has its default action again.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)

    def __init__(self) -> None:
        self.received = self.interrupted = False  # interrupted: by Ctrl-C
        self._saved_step: int | None = None  # not None while a signal may end the process at once
        self._previous = {number: signal.signal(number, self._note) for number in self.SIGNALS}

    @contextmanager
    def exit_on_signal(self, saved_step: int) -> Iterator[None]:
        """In the body of the `with` statement, a signal ends the process at once: the state is saved at `saved_step`.

        A signal that came before the body does so too. The exit code is `code`. After the body, signals are recorded.
        """
        self._saved_step = saved_step
        if self.received:
            self._exit(saved_step)
        try:
            yield
        finally:
            self._saved_step = None

    def check(self) -> None:
        """Raise a StopRequestedError if a signal was received."""
        if self.received:
            raise StopRequestedError("a signal asked to stop; the measurement ends here")

    def said(self, saved_step: int) -> str:
        """The last line for the user after a signal."""
        by = "stopped by Ctrl-C" if self.interrupted else "a signal asked to stop"
        return f"{by}: saved at step {saved_step}; the same command goes on from there"

    @property
    def code(self) -> int:
        """The exit code of a process that has saved after a signal."""
        return ExitCode.INTERRUPTED if self.interrupted else ExitCode.REQUEUE

    def restore(self) -> None:
        """Restore the previous handlers."""
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
        if parallel.this_rank() == 0:  # without Python's buffers, which the signal may have interrupted
            os.write(2, f"\n{line}\n".encode())


class HangWatch:
    """Ends the process if `alive()` was not called for `seconds`, and writes the stacks of all its threads to a file.

    Without it, a rank that waits in a collective for a dead rank would wait forever, and the job would keep its GPUs.

    The watch is a thread that counts its own wake-ups. While the process is suspended (SIGSTOP, `scontrol suspend`),
    the thread does not wake up, so that time does not count. The thread needs the interpreter's lock, which
    collectives, reads and waits for a GPU release. If a rank hangs with the lock, the other ranks wait for it until
    their watches end them; then the launcher ends the hanging rank.
    """

    WAKE_UPS = 20  # number of wake-ups in `seconds`

    def __init__(self, seconds: float, stacks: Path) -> None:
        """Append stacks to the file `stacks`, after those of earlier hangs; if `seconds` is 0, watch nothing."""
        self._seconds, self._path = seconds, stacks
        self._file = stacks.open("a") if seconds > 0 else None
        self._signs, self._paused = 0, True  # signs: calls of `alive`
        self._closed = threading.Event()
        if self._file is not None:
            threading.Thread(target=self._watch, args=(self._file,), name="hang watch", daemon=True).start()

    def alive(self) -> None:
        """Start counting again from zero."""
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
