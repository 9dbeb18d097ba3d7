"""Signals, Ctrl-C, and the traces of a hang."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import pytest

from jitscale.errors import ExitCode, StopRequestedError
from jitscale.training.stopping import HangWatch, StopSignal


def test_the_stacks_of_an_earlier_hang_are_kept(tmp_path: Path) -> None:
    stacks = tmp_path / "stacks.txt"
    watch = HangWatch(100.0, stacks)
    watch.alive()
    watch.close()
    assert not stacks.exists(), "no file is written without a hang"
    stacks.write_text("Thread 1: all_reduce\n")
    HangWatch(100.0, stacks).close()
    assert stacks.read_text() == "Thread 1: all_reduce\n"


def fork(work: Callable[[], object]) -> tuple[int, TextIO]:
    """Do `work` in a fork; returns its process id and its standard error. Its exit code is 0 if the work ends."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        os.dup2(writing, 2)
        os.close(writing)
        try:
            work()
        finally:
            os._exit(0)
    os.close(writing)
    return process, os.fdopen(reading)


def ready() -> None:
    os.write(2, b"ready\n")
    time.sleep(20)


def exit_code(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGTERM, ExitCode.REQUEUE, "a signal asked to stop"),
        (signal.SIGINT, ExitCode.INTERRUPTED, "stopped by Ctrl-C"),
    ],
)
def test_a_signal_ends_the_process_at_once_if_everything_is_saved(number: int, code: int, said: str) -> None:
    def measure() -> None:
        with StopSignal().exit_on_signal(7):
            ready()

    process, output = fork(measure)
    assert output.readline() == "ready\n"
    os.kill(process, number)
    assert exit_code(process) == code
    assert f"{said}: saved at step 7; the same command goes on from there\n" in output.read()


def test_the_first_ctrl_c_is_noted_and_the_second_ends_the_process() -> None:
    def train() -> None:
        stop = StopSignal()
        while not stop.received:
            os.write(2, b"." if stop.code == ExitCode.REQUEUE else b"?")
            time.sleep(0.01)
        assert stop.code == ExitCode.INTERRUPTED
        with pytest.raises(StopRequestedError):
            stop.check()
        ready()

    process, output = fork(train)
    assert output.read(1) == "."
    os.kill(process, signal.SIGINT)
    while (line := output.readline()) != "ready\n":
        assert line, "the process has ended too early"
    os.kill(process, signal.SIGINT)
    assert exit_code(process) == -signal.SIGINT


def test_a_suspended_process_does_not_count_as_hanging(tmp_path: Path) -> None:
    """The process hangs after its suspension. Only then the watch ends it."""

    def hang() -> None:
        watch = HangWatch(0.6, tmp_path / "stacks.txt")
        watch.alive()
        ready()

    process, output = fork(hang)
    assert output.readline() == "ready\n"
    os.kill(process, signal.SIGSTOP)
    time.sleep(0.9)
    os.kill(process, signal.SIGCONT)
    time.sleep(0.2)
    assert os.waitpid(process, os.WNOHANG) == (0, 0), "the time of the suspension must not count"
    assert exit_code(process) == ExitCode.FAILED
    stacks = (tmp_path / "stacks.txt").read_text()
    assert stacks.startswith("Timeout: no step for 0.6 s\n")
    assert "in ready" in stacks


def test_a_hang_ends_the_process_even_on_a_full_disk() -> None:
    def hang() -> None:
        HangWatch(0.2, Path("/dev/full")).alive()
        ready()

    process, output = fork(hang)
    assert output.readline() == "ready\n"
    assert exit_code(process) == ExitCode.FAILED
