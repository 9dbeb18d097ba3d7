"""One step of a sampler along dz/dt = v(z, t), for any velocity and any grid of times.

`euler` and `heun` are single-step methods. `2m` and `ab2` are multistep methods: they reuse the evaluation of the
previous step, so that a second-order step costs one evaluation. If the velocity is smooth, halving the step size
divides the error of `euler` by 2, and that of the others by 4. On the whole range of times, where `t_eps` affects the
last steps, this still holds for `heun` and `ab2`, but `2m` divides the error by about 3
(tests/diffusion/test_steps.py).

Shapes: B batch, A channels; states and velocities are (B, A, height, width).
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]  # (state, time) -> velocity


class State(NamedTuple):
    """The state of a sampler; its next steps depend on nothing else."""

    z: Tensor
    before: Tensor | None = None  # the history of a multistep method, from the previous step


def times(steps: int, shift: float = 1.0) -> list[float]:
    """The grid of times from 0 to 1, rounded to float32 as networks see it: t / (t + (1 - t) shift) for uniform t."""
    if shift == 1.0:
        return torch.linspace(0.0, 1.0, steps + 1).tolist()  # the authors' grid to the last bit
    uniform = torch.arange(steps + 1, dtype=torch.float64) / steps
    return (uniform / (uniform + (1 - uniform) * shift)).float().tolist()


def looks_ahead(method: str, t_next: float) -> bool:
    """True if a step to `t_next` also evaluates the velocity at `t_next`."""
    return method == "heun" and t_next < 1.0


def advance(method: str, grid: Sequence[float], index: int, state: State, velocity: Velocity) -> State:
    """Step `index` of the ascending `grid` of times.

    A multistep method keeps its history where guidance begins or ends, although the velocity jumps there. The first
    step after the jump overshoots by half of the jump. This compensates for the previous step: on average, half of that
    step lay beyond the jump, but used the velocity before it. Measured on closed-form fields of mixtures (three points;
    400 digits; scales 2 and 3; 20 to 100 steps): forgetting the history where guidance begins made the error 1.4 to 1.7
    times as large, in 126 of 160 settings; where guidance ends, 0.96 to 0.99 times.
    """
    z, (t, t_next) = state.z, grid[index : index + 2]
    h, v = t_next - t, velocity(z, t)
    if method == "2m":
        return _second_order_multistep(grid, index, state, v)
    if method == "ab2":
        # The second-order Adams-Bashforth method for steps of different lengths.
        if state.before is None:
            return State(z + h * v, v)
        ratio = h / (t - grid[index - 1])
        return State(z + h * ((1 + ratio / 2) * v - ratio / 2 * state.before), v)
    z_next = z + h * v
    if looks_ahead(method, t_next):
        z_next = z + h * 0.5 * (v + velocity(z_next, t_next))
    return State(z_next)


def _second_order_multistep(grid: Sequence[float], index: int, state: State, v: Tensor) -> State:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2): extrapolates x over the step.

    An Euler step of the velocity is already the first-order exponential step, with x = z + (1 - t) v. The length of a
    step is measured in log(t / (1 - t)), which is infinite at both ends of the grid. Therefore the correction is zero
    after the first step, and is left out in the last step.
    """
    t, t_next = grid[index : index + 2]
    x = state.z + (1 - t) * v
    z_next = state.z + (t_next - t) * v
    if state.before is not None and t_next < 1.0 and (t_before := grid[index - 1]) > 0.0:
        ratio = (_log_ratio(t_next) - _log_ratio(t)) / (_log_ratio(t) - _log_ratio(t_before))
        z_next = z_next + (t_next - t) / (1 - t) * (ratio / 2) * (x - state.before)
    return State(z_next, x)


def _log_ratio(t: float) -> float:
    return math.log(t / (1 - t))
