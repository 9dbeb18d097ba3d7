"""Sampling: steps along the network's velocity with guidance inside an interval (arXiv 2511.13720, section 4, table 9).

Shapes: B batch, A channels; images are (B, A, height, width).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor

from jitscale.config.schema import LEAST_SHIFT, METHODS, MOST_SHIFT, MOST_STEPS
from jitscale.diffusion.objective import to_spaces
from jitscale.diffusion.steps import State, advance, looks_ahead, times

# network(z, t, y): a JiT, or any function, if the sampler needs no subspace and no middle output layer.
Network = Callable[..., Tensor]


@dataclass(frozen=True)
class Sampler:
    """Makes images from noise.

    Guidance is v = v_u + w (v_c - v_u) (Ho and Salimans 2022), where v_c is the velocity with the label, and v_u the
    velocity without it. With a guide, v_u is the guide's velocity with the label (autoguidance, Karras et al. 2024,
    arXiv 2406.02507).

    Internal guidance is v = v_m + w (v - v_m), where v_m is the velocity of the network's middle output layer (arXiv
    2512.24176). It is applied to both v_c and v_u, before guidance combines them, but not to a guide.
    """

    method: str = "heun"  # one of config's METHODS; heun: `steps` - 1 Heun steps, then an Euler step to t = 1
    steps: int = 50  # intervals of the time grid on [0, 1]
    guidance_scale: float = 1.0  # w; 1 means none
    # Guidance is applied for low < t < high (Kynkäänniemi et al. 2024); `low` = 0 includes t = 0.
    guidance_interval: tuple[float, float] = (0.1, 1.0)
    prediction: str = "x"  # the network's prediction: x, e, v or asym
    t_eps: float = 0.05  # smallest denominator, as in training
    time_shift: float = 1.0  # s of the grid t / (t + (1 - t) s); 1: uniform
    internal_guidance: float = 1.0  # w of the middle output layer; 1 means none
    internal_interval: tuple[float, float] = (0.0, 1.0)  # see `guidance_interval`

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method: must be one of {', '.join(METHODS)}, got {self.method!r}")
        if not 1 <= self.steps <= MOST_STEPS:
            raise ValueError(f"steps: must be in [1, {MOST_STEPS}], got {self.steps}")
        for name in ("guidance", "internal"):
            low, high = interval = getattr(self, f"{name}_interval")
            if not 0 <= low < high <= 1:
                raise ValueError(f"{name}_interval: must be two times 0 <= low < high <= 1, got {interval}")
        for name in ("guidance_scale", "internal_guidance"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}: must be finite, got {getattr(self, name)}")
        if not LEAST_SHIFT <= self.time_shift <= MOST_SHIFT:
            raise ValueError(f"time_shift: must be in [{LEAST_SHIFT:g}, {MOST_SHIFT:g}], got {self.time_shift}")

    def guides_at(self, t: float) -> bool:
        """True if the unconditional prediction is needed at time `t`."""
        return self.guidance_scale != 1.0 and _inside(self.guidance_interval, t)

    def guides_internally_at(self, t: float) -> bool:
        """True if the prediction of the middle output layer is needed at time `t`."""
        return self.internal_guidance != 1.0 and _inside(self.internal_interval, t)

    def steps_before_guidance(self) -> int:
        """Number of steps from t = 0 on that do not depend on the guidance scale."""
        for index, (t, t_next) in enumerate(pairwise(self._grid())):
            looks_into = looks_ahead(self.method, t_next) and _inside(self.guidance_interval, t_next)
            if _inside(self.guidance_interval, t) or looks_into:
                return index
        return self.steps

    def evaluations(self, steps: range | None = None) -> tuple[int, int]:
        """Evaluations of the network for an image in `steps` (None: all): with its label, and for guidance.

        Internal guidance needs no extra evaluation: one evaluation gives both predictions.
        """
        grid = self._grid()
        strong = weak = 0
        for index in range(self.steps) if steps is None else steps:
            t, t_next = grid[index : index + 2]
            seen = [t, t_next] if looks_ahead(self.method, t_next) else [t]
            strong += len(seen)
            weak += sum(self.guides_at(each) for each in seen)
        return strong, weak

    @torch.no_grad()
    def sample(
        self, network: Network, noise: Tensor, labels: Tensor, null_label: int, guide: Network | None = None
    ) -> Tensor:
        """Integrate from `noise` (already times the noise scale) at t = 0 to images at t = 1.

        The state is float32, whatever the precision of the network. Where guidance is applied, `network(z, t, y)` gets
        conditional and unconditional images in one batch of 2 B; elsewhere it gets B images. With a `guide` (a smaller
        or less trained network), `network` always gets B images, and the guide gets B images where guidance is applied.
        Returns (B, A, height, width) float32, nominally in [-1, 1], not clamped.
        """
        return self.carry(network, State(noise.float()), labels, null_label, range(self.steps), guide).z

    @torch.no_grad()
    def carry(
        self,
        network: Network,
        state: State,
        labels: Tensor,
        null_label: int,
        steps: range,
        guide: Network | None = None,
    ) -> State:
        """Like `sample`, but take only `steps`, from the `state` before the first of them."""
        grid = self._grid()

        def velocity(z: Tensor, t: float) -> Tensor:
            return self._velocity(network, z, t, labels, null_label, guide)

        for index in steps:
            state = advance(self.method, grid, index, state, velocity)
        return state

    def _grid(self) -> list[float]:
        return times(self.steps, self.time_shift)

    def _velocity(
        self, network: Network, z: Tensor, t: float, labels: Tensor, null_label: int, guide: Network | None
    ) -> Tensor:
        internally = self.guides_internally_at(t)
        if not self.guides_at(t):
            return self._of(network, z, t, labels, internally=internally)
        if guide is not None:
            weak = self._of(guide, z, t, labels, internally=False)
            strong = self._of(network, z, t, labels, internally=internally)
        else:
            both = torch.cat([labels, torch.full_like(labels, null_label)])
            strong, weak = self._of(network, torch.cat([z, z]), t, both, internally=internally).chunk(2)
        return weak + self.guidance_scale * (strong - weak)

    def _of(self, network: Network, z: Tensor, t: float, labels: Tensor, *, internally: bool) -> Tensor:
        """The velocity that a network predicts, with internal guidance if `internally`."""
        at, subspace = torch.full((len(z),), t, device=z.device), getattr(network, "subspace", None)

        def velocity(prediction: Tensor) -> Tensor:
            return to_spaces(prediction.float(), z, at, self.prediction, self.t_eps, subspace).v

        if not internally:
            return velocity(network(z, at, labels))
        final, middle = map(velocity, network(z, at, labels, middle=True))
        return middle + self.internal_guidance * (final - middle)


def _inside(interval: tuple[float, float], t: float) -> bool:
    # Compared in float32, as in the authors' code: with ten steps, t = 0.1 is not above an interval's low end of 0.1.
    low, high = cast(list[float], torch.tensor(interval, dtype=torch.float32).tolist())
    return (t > low or low == 0.0) and t < high
