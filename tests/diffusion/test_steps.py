"""Steps of the samplers: their order of convergence on a closed-form field, their formulas, and the grid of times."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from jitscale.config.schema import LEAST_SHIFT, MOST_SHIFT, MOST_STEPS
from jitscale.diffusion.sampler import Sampler
from jitscale.diffusion.steps import State, Velocity, advance, times

POINTS = torch.tensor([[-0.8, -0.4], [0.7, 0.6], [0.1, -0.9]], dtype=torch.float64)
SPREAD = 0.15
NOISE = torch.randn(100, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
SHIFTS = [1.0, 2.0, 0.5]


def field(t_eps: float) -> Velocity:
    """The velocity of x-prediction by a network that knows the data: one Gaussian around each of the three points."""

    def velocity(z: Tensor, t: float) -> Tensor:
        variance = (t * SPREAD) ** 2 + (1 - t) ** 2
        distances = (z[:, None] - t * POINTS).square().sum(dim=2)
        centre = torch.softmax(-distances / (2 * variance), dim=1) @ POINTS
        x = centre + t * SPREAD**2 / variance * (z - t * centre)
        return (x - z) / max(1 - t, t_eps)

    return velocity


def carried(method: str, grid: list[float], velocity: Velocity) -> Tensor:
    state = State(NOISE)
    for index in range(len(grid) - 1):
        state = advance(method, grid, index, state, velocity)
    return state.z


def exact(low: float, high: float, velocity: Velocity) -> Tensor:
    """The reference solution, by the Runge-Kutta method of fourth order."""
    z, h = NOISE, (high - low) / 2000
    for index in range(2000):
        t = low + index * h
        first = velocity(z, t)
        second = velocity(z + h / 2 * first, t + h / 2)
        third = velocity(z + h / 2 * second, t + h / 2)
        z = z + h / 6 * (first + 2 * second + 2 * third + velocity(z + h * third, t + h))
    return z


def gains(method: str, shift: float, low: float, high: float, t_eps: float) -> list[float]:
    """The factor by which the error falls if the number of steps (40, 80, 160, 320) is doubled."""
    velocity, errors = field(t_eps), []
    end = exact(low, high, velocity)
    for steps in (40, 80, 160, 320, 640):
        uniform = [index / steps for index in range(steps + 1)]
        grid = [low + (high - low) * t / (t + (1 - t) * shift) for t in uniform]
        errors.append(float((carried(method, grid, velocity) - end).norm()))
    return [coarse / fine for coarse, fine in pairwise(errors)]


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("method", ["heun", "2m", "ab2"])
def test_second_order_on_a_smooth_field(method: str, shift: float) -> None:
    """No denominator is clamped. The grid has uniform or varying steps. Euler's method is of first order."""
    assert min(gains(method, shift, 0.1, 0.9, 1e-9)[1:]) >= 3.7
    assert max(gains("euler", shift, 0.1, 0.9, 1e-9)[1:]) <= 2.1


@pytest.mark.parametrize(("method", "least", "most"), [("heun", 3.7, 4.3), ("ab2", 3.7, 4.3), ("2m", 2.9, 3.4)])
def test_the_clamp_costs_2m_half_an_order(method: str, least: float, most: float) -> None:
    """Sampling goes from pure noise to t = 1 with t_eps = 0.05: 2m's error falls 3.1 times, not 4 times.

    Its steps follow 1 / (1 - t) beyond the clamp, but the field no longer does. Its last step is of first order.
    """
    assert all(least <= gain <= most for gain in gains(method, 1.0, 0.0, 1.0, 0.05)[1:])


def test_an_euler_step_is_the_exponential_step() -> None:
    """z' = x + (1 - t') / (1 - t) (z - x), with x = z + (1 - t) v: the step is exact if x is constant."""
    velocity = field(0.05)
    v = velocity(NOISE, 0.3)
    x = NOISE + 0.7 * v
    step = advance("euler", [0.3, 0.42], 0, State(NOISE), velocity).z
    torch.testing.assert_close(step, x + 0.58 / 0.7 * (NOISE - x), rtol=0, atol=1e-14)


def test_2m_extrapolates_the_image_in_the_log_ratio() -> None:
    """The middle steps equal DPM-Solver++ (algorithm 2). The first two steps and the last one have no correction."""
    velocity, grid = field(0.05), [0.0, 0.1, 0.3, 0.6, 1.0]

    def log_ratio(t: float) -> float:
        return math.log(t / (1 - t))

    state = State(NOISE)
    for index, (t, t_next) in enumerate(pairwise(grid)):
        x = state.z + (1 - t) * velocity(state.z, t)
        target = x
        if index == 2:
            r = (log_ratio(0.3) - log_ratio(0.1)) / (log_ratio(0.6) - log_ratio(0.3))
            assert state.before is not None
            target = x + (x - state.before) / (2 * r)
        expected = target + (1 - t_next) / (1 - t) * (state.z - target)
        state = advance("2m", grid, index, state, velocity)
        torch.testing.assert_close(state.z, expected, rtol=0, atol=1e-13)
        assert state.before is not None
        torch.testing.assert_close(state.before, x, rtol=0, atol=0)


def test_ab2_is_exact_where_the_velocity_is_linear_in_time() -> None:
    """This holds for steps of any length, as soon as there is a history."""
    grid = [0.1, 0.25, 0.3, 0.7, 1.0]

    def velocity(z: Tensor, t: float) -> Tensor:
        return torch.full_like(z, 3 - 4 * t)

    state = State(torch.zeros(1), velocity(torch.zeros(1), grid[0]))
    for index in range(1, 4):
        state = advance("ab2", grid, index, state, velocity)
    assert float(state.z) == pytest.approx(3 * 0.75 - 2 * (1 - 0.25**2), abs=1e-6)


def test_times_are_uniform_or_shifted() -> None:
    for steps in (1, 3, 10, 50, 999):
        assert times(steps) == times(steps, 1.0) == torch.linspace(0.0, 1.0, steps + 1).tolist(), (
            "the times are bit-equal"
        )
    assert times(2, 2.0) == [0.0, pytest.approx(1 / 3), 1.0]
    for shift in (LEAST_SHIFT, 0.5, 2.0, MOST_SHIFT):
        grid = times(1000, shift)
        assert (grid[0], grid[-1]) == (0.0, 1.0)
        assert all(t < t_next for t, t_next in pairwise(grid))
        assert torch.tensor(grid).tolist() == grid, "the network gets the same time that the step uses"


def test_a_shifted_time_on_an_intervals_edge_lies_outside() -> None:
    """The uniform grid behaves the same way. Of 11 steps shifted by 2, the third begins at 0.1, up to float32."""
    sampler = Sampler("euler", 11, 3.0, (0.1, 1.0), time_shift=2.0)
    assert times(11, 2.0)[2] == pytest.approx(0.1, abs=1e-8)
    assert sampler.steps_before_guidance() == 3


@pytest.mark.parametrize("shift", [LEAST_SHIFT, MOST_SHIFT])
def test_the_finest_grid_rises_strictly(shift: float) -> None:
    """Multistep methods divide by the length of a step."""
    assert all(t < t_next for t, t_next in pairwise(times(MOST_STEPS, shift)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "rk4"}, "must be one of euler"),
        ({"time_shift": 0.0}, "0.01"),
        ({"steps": 0}, r"steps: must be in \[1, 10000\], got 0"),
        ({"steps": MOST_STEPS + 1}, "got 10001"),
        ({"internal_interval": (0.9, 0.1)}, "internal_interval: must be two times"),
        ({"guidance_interval": (0.1, 1.1)}, "guidance_interval: must be two times"),
        ({"internal_guidance": math.nan}, "internal_guidance: must be finite"),
    ],
)
def test_impossible_samplers_are_refused(change: dict[str, object], message: str) -> None:
    build: Callable[..., Sampler] = Sampler
    with pytest.raises(ValueError, match=message):
        build(**change)
