"""What a run watches: bad samples, spikes, stacks of hangs, signals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from jitscale.errors import DataError, ExitCode
from jitscale.training.watch import BadSamples, HangWatch, LossSpikes, StepOutcomes
from tests.support import ROOT


def test_a_rollback_counts_bad_samples_once() -> None:
    bad = BadSamples(0.5)
    bad.begin_again(5)
    bad.note(["a", "b", "c"])
    assert bad.total() == 8
    bad.begin_again(5)  # the same images will be read again
    assert bad.total() == 5
    bad.note(["a", "b", "c"] * 3)
    assert bad.check(bad.here, 100) == 14
    with pytest.raises(DataError):
        bad.check(bad.here, 20)


def test_verdicts_are_read_in_order_and_late_where_reading_waits() -> None:
    moved = [True, False, False, True, False]
    at_once = StepOutcomes(torch.device("cpu"))
    assert [at_once.add(torch.tensor(one)) for one in moved] == [[one] for one in moved]
    assert at_once.settle() == []
    late = StepOutcomes(torch.device("cuda"))
    assert [late.add(torch.tensor(one)) for one in moved] == [[], [], [True], [False], [False]]
    assert late.settle() == [True, False]
    assert late.settle() == []


def test_a_spike_stands_far_above_and_a_nan_is_none() -> None:
    spikes = LossSpikes()
    for step in range(40):
        assert not spikes.record(1.0 + 0.01 * (step % 7))
    assert spikes.record(3.0)
    for _ in range(10):
        assert not spikes.record(float("nan"))
    for step in range(60):
        assert not spikes.record(1.0 + 0.01 * (step % 7)), "what was not finite must not disturb the median"
    assert spikes.record(3.0)


def test_the_stacks_of_an_earlier_hang_stay(tmp_path: Path) -> None:
    stacks = tmp_path / "stacks.txt"
    watch = HangWatch(100.0, stacks)
    watch.alive()
    watch.close()
    assert not stacks.exists(), "nothing has hung"
    stacks.write_text("Thread 1: all_reduce\n")
    HangWatch(100.0, stacks).close()
    assert stacks.read_text() == "Thread 1: all_reduce\n"


def test_a_signal_while_everything_is_saved_asks_for_a_requeue() -> None:
    program = (
        "import time; from jitscale.training.watch import StopSignal\n"
        "with StopSignal().exit_on_signal(): print('ready', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == ExitCode.REQUEUE
    assert time.monotonic() - began < 20
