"""The engine's updates of averages: warm-up, power functions, skipped steps. Every rank runs the same code."""

import numpy as np
import pytest
import torch

from jitscale.checkpoints.power_averages import gamma_of_width
from jitscale.config import EmaConfig, power_name
from jitscale.training.ema import ShardedEma


def averages(settings: EmaConfig, weights: list[float]) -> dict[str, list[float]]:
    """The averages of a scalar with these values, after each step of 8 images."""
    ema = ShardedEma(settings, [torch.zeros(1)])
    found: dict[str, list[float]] = {name: [] for name in ema.sets}
    for step, weight in enumerate(weights, 1):
        ema.update([torch.tensor([weight])], step, (8 * (step - 1), 8 * step))
        for name, flats in ema.sets.items():
            found[name].append(float(flats[0]))
    return found


def test_warm_up_is_min_of_decay_and_1_plus_step_over_10_plus_step() -> None:
    """The decays are 2/11, 3/12, 4/13, ...

    They reach the configured decay at step 80, where (1 + 80) / (10 + 80) = 0.9.
    """
    warm = averages(EmaConfig(decays=[0.9], warmup=True), [1.0] * 120)["ema_0.9"]
    expected, left = [], 1.0
    for step in range(1, 121):
        left *= (1 + step) / (10 + step) if step < 80 else 0.9
        expected.append(1 - left)
    assert warm == pytest.approx(expected, rel=1e-6)
    assert warm[0] == pytest.approx(9 / 11)
    late = averages(EmaConfig(decays=[0.1], warmup=True), [1.0])["ema_0.1"]
    assert late == pytest.approx([0.9]), "the configured decay is the limit from the first step on"


def test_without_warm_up_the_decay_is_fixed() -> None:
    plain = averages(EmaConfig(decays=[0.9]), [1.0] * 20)["ema_0.9"]
    assert plain == pytest.approx([1 - 0.9**step for step in range(1, 21)], rel=1e-6)


@pytest.mark.parametrize("width", [0.05, 0.1, 0.25])
def test_the_weight_of_every_image_follows_the_power_function(width: float) -> None:
    """The weights are one-hot in the step, so the average is its own profile. The batch size changes on the way.

    The exact weight of a step is the integral of the profile over its images. The profile has the standard deviation
    that the width defines.
    """
    batches = [4] * 300 + [12] * 300
    ends = np.cumsum(batches)
    ema = ShardedEma(EmaConfig(decays=[], power_widths=[width]), [torch.full((600,), 7.0, dtype=torch.float64)])
    for step, (batch, end) in enumerate(zip(batches, ends, strict=True)):
        ema.update([torch.eye(600, dtype=torch.float64)[step]], step + 1, (int(end - batch), int(end)))
    found = ema.power_sets[power_name(width)][0].numpy()
    share = (ends / ends[-1]) ** (gamma_of_width(width) + 1)
    np.testing.assert_allclose(found, np.diff(share, prepend=0.0), rtol=1e-10)
    middles = (ends - np.array(batches) / 2) / ends[-1]
    mean = np.sum(found * middles)
    assert np.sqrt(np.sum(found * (middles - mean) ** 2)) == pytest.approx(width, rel=3e-4)


def test_a_skipped_step_updates_power_functions_only() -> None:
    """Its images were seen, and the weights did not change. Fixed decays count only steps that move the weights."""
    settings = EmaConfig(decays=[0.5], power_widths=[0.1])
    ema = ShardedEma(settings, [torch.zeros(2)])
    values = [torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])]
    for step, (value, moved) in enumerate(zip(values, (True, False, True), strict=True), 1):
        ema.update([value], step, (8 * (step - 1), 8 * step), moved=moved)
    assert ema.sets["ema_0.5"][0].tolist() == pytest.approx([0.25, 0.5])
    first = (2 / 3) ** (gamma_of_width(0.1) + 1)
    assert ema.sets["power_0.100"][0].tolist() == pytest.approx([first, 1 - first])


def test_the_first_step_replaces_the_initial_values() -> None:
    found = averages(EmaConfig(decays=[], power_widths=[0.05, 0.1]), [3.0, 3.0])
    assert found == {"power_0.050": [3.0, 3.0], "power_0.100": [3.0, 3.0]}


def test_names_are_short_and_distinct() -> None:
    assert [power_name(w) for w in (0.05, 0.1, 0.123, 0.0125)] == [
        "power_0.050",
        "power_0.100",
        "power_0.123",
        "power_0.0125",
    ]
