"""Limits for an attempt of the fuzzer: its time, its memory and its folders."""

import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

SECONDS = 10.0  # processor seconds for one input
PATIENCE = 100.0  # seconds until an input counts as hanging; other processes may keep the processors busy
ROOM = 3 * 2**30  # bytes of memory for one input, in addition to those of the process


class TooSlow(BaseException):
    """An input has used up its time."""


@contextmanager
def restored() -> Iterator[None]:
    """Restore the environment, the folder, the signals and Python's flag about bytecode after the block."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGPROF)
    handlers, here = {number: signal.getsignal(number) for number in numbers}, os.getcwd()
    with mock.patch.dict(os.environ), mock.patch.object(sys, "dont_write_bytecode", True):
        try:
            yield
        finally:
            os.chdir(here)
            for number, handler in handlers.items():
                signal.signal(number, handler)


@contextmanager
def limits() -> Iterator[None]:
    """The block has at most SECONDS and ROOM."""

    def stop(*_: object) -> None:
        raise TooSlow(f"more than {SECONDS:g} s of a processor, or {PATIENCE:g} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    timers = ((signal.SIGPROF, signal.ITIMER_PROF, SECONDS), (signal.SIGALRM, signal.ITIMER_REAL, PATIENCE))
    for number, timer, seconds in timers:
        signal.signal(number, stop)
        signal.setitimer(timer, seconds)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + ROOM, hard))
    try:
        yield
    finally:
        for _, timer, _ in timers:
            signal.setitimer(timer, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# An audit hook cannot be removed, so there is one for all attempts.
_watching: list[Callable[[str, tuple[Any, ...]], None]] = []
_CHANGES = {"os.mkdir": (1, 2), "os.remove": (1, 1), "os.rmdir": (1, 1), "os.rename": (2, 2), "os.truncate": (1, None)}
# the number of paths, and the position of dir_fd
_CHANGES |= {"os.symlink": (2, 2), "os.link": (2, 2), "os.chmod": (1, 2), "os.utime": (1, 3)}


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    for hear in _watching:
        hear(event, arguments)


@contextmanager
def watched(allowed: Sequence[Path], touched: list[str]) -> Iterator[None]:
    """Refuse and record all changes by Python outside of `allowed`. No connection leaves this machine."""
    if not hasattr(watched, "installed"):
        sys.addaudithook(_hear)
        watched.installed = True  # type: ignore[attr-defined]
    roots = tuple(f"{path}" for path in allowed)

    def check(path: Any, folder: int | None = None) -> None:
        if isinstance(path, int) or path is None:
            return
        place = os.fsdecode(path)
        if folder is not None and folder >= 0:
            place = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), place)
        real = os.path.realpath(place)
        if not any(real == root or real.startswith(f"{root}/") for root in (*roots, "/dev", "/proc/self")):
            touched.append(real)
            raise PermissionError(13, "the fuzzer keeps it", place)

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND):
                check(path)
        elif event in _CHANGES:
            paths, at = _CHANGES[event]
            folder = arguments[at] if at is not None and at < len(arguments) else None
            for path in arguments[paths - 1 : paths] if event in ("os.symlink", "os.link") else arguments[:paths]:
                check(path, folder)
        elif event == "socket.getaddrinfo" and arguments[0] not in (None, "localhost", "127.0.0.1", "::1"):
            raise OSError(101, "the fuzzer has no network")

    _watching.append(hear)
    try:
        yield
    finally:
        _watching.remove(hear)
