"""The watches of a run: bad samples, skipped steps, spikes."""

import pytest
import torch

from jitscale.errors import DataError
from jitscale.training.watch import BadSamples, LossSpikes, StepOutcomes


def test_a_rollback_counts_bad_samples_once() -> None:
    bad = BadSamples(0.5)
    bad.begin_again(5)
    bad.note(["a", "b", "c"])
    assert bad.total() == 8
    bad.begin_again(5)  # The same images will be read again.
    assert bad.total() == 5
    bad.note(["a", "b", "c"] * 3)
    assert bad.check(bad.here, 100) == 14
    with pytest.raises(DataError):
        bad.check(bad.here, 20)


def test_verdicts_are_read_in_order_and_late_if_reading_waits() -> None:
    moved = [True, False, False, True, False]
    at_once = StepOutcomes(torch.device("cpu"))
    assert [at_once.add(torch.tensor(one)) for one in moved] == [[one] for one in moved]
    assert at_once.settle() == []
    late = StepOutcomes(torch.device("cuda"))
    assert [late.add(torch.tensor(one)) for one in moved] == [[], [], [True], [False], [False]]
    assert late.settle() == [True, False]
    assert late.settle() == []


def test_a_spike_is_far_above_the_median_and_a_nan_is_not_a_spike() -> None:
    spikes = LossSpikes()
    for step in range(40):
        assert not spikes.record(1.0 + 0.01 * (step % 7))
    assert spikes.record(3.0)
    for _ in range(10):
        assert not spikes.record(float("nan"))
    for step in range(60):
        assert not spikes.record(1.0 + 0.01 * (step % 7)), "values that are not finite must not change the median"
    assert spikes.record(3.0)
