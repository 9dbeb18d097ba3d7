"""How a process of a run is asked to stop, by signals, and ends if it hangs."""

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
        return ExitCode.INTERRUPTED if self.interrupted else ExitCode.REQUEUE

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
