"""Sampling: Euler and Heun steps with guidance inside an interval (arXiv 2511.13720, section 4 and table 9).

Shapes: B batch; images are (B, 3, height, width).
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor

from jitscale.diffusion.objective import to_spaces

Network = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Sampler:
    """How noise becomes images.

    Guidance is v = v_u + w (v_c - v_u) (Ho and Salimans 2022), where v_u is the velocity without the label. With a
    guide, it is that network's velocity with the label (autoguidance, Karras et al. 2024, arXiv 2406.02507).
    """

    method: str = "heun"  # or "euler"; heun: `steps` - 1 Heun steps and one Euler step to t = 1
    steps: int = 50  # intervals of the uniform time grid on [0, 1]
    guidance_scale: float = 1.0  # w; 1 means none
    # Guidance acts for low < t < high (Kynkäänniemi et al. 2024); `low` = 0 includes t = 0.
    guidance_interval: tuple[float, float] = (0.1, 1.0)
    prediction: str = "x"  # what the network predicts: x, e or v
    t_eps: float = 0.05  # smallest denominator, as in training

    def __post_init__(self) -> None:
        if self.method not in ("euler", "heun"):
            raise ValueError(f"method: {self.method!r} is neither 'euler' nor 'heun'")

    def guides_at(self, t: float) -> bool:
        """Whether the unconditional prediction is needed at time `t`."""
        return self.guidance_scale != 1.0 and self._in_interval(t)

    def steps_before_guidance(self) -> int:
        """Steps from t = 0 on that are the same whatever the guidance scale."""
        for index, (t, t_next) in enumerate(pairwise(self._grid())):
            if self._in_interval(t) or (self._corrects(index) and self._in_interval(t_next)):
                return index
        return self.steps

    def evaluations(self, steps: range | None = None) -> tuple[int, int]:
        """How often `steps`, or all, take an image through the network: with its label, and for guidance."""
        grid = self._grid()
        strong = weak = 0
        for index in range(self.steps) if steps is None else steps:
            times = grid[index : index + 2] if self._corrects(index) else grid[index : index + 1]
            strong += len(times)
            weak += sum(self.guides_at(t) for t in times)
        return strong, weak

    @torch.no_grad()
    def sample(
        self, network: Network, noise: Tensor, labels: Tensor, null_label: int, guide: Network | None = None
    ) -> Tensor:
        """Carry `noise` (already times the noise scale) from t = 0 to t = 1.

        The state stays in float32 whatever the network computes in. `network(z, t, y)` sees conditional and
        unconditional images in one batch of 2 B where guidance acts, and B images where it does not. With a `guide`,
        a smaller or less trained network, `network` sees B images, and so does the guide where guidance acts. Returns
        (B, 3, height, width) float32, nominally in [-1, 1]; not clamped.
        """
        return self.carry(network, noise.float(), labels, null_label, range(self.steps), guide)

    @torch.no_grad()
    def carry(
        self, network: Network, z: Tensor, labels: Tensor, null_label: int, steps: range, guide: Network | None = None
    ) -> Tensor:
        """Do some of the steps, as `sample` does all: from the state `z` (B, 3, height, width) before the first one."""
        grid = self._grid()
        for index in steps:
            t, t_next = grid[index], grid[index + 1]
            v = self._velocity(network, z, t, labels, null_label, guide)
            z_next = z + (t_next - t) * v
            if self._corrects(index):
                v_next = self._velocity(network, z_next, t_next, labels, null_label, guide)
                z_next = z + (t_next - t) * 0.5 * (v + v_next)
            z = z_next
        return z

    def _grid(self) -> list[float]:
        return cast(list[float], torch.linspace(0.0, 1.0, self.steps + 1).tolist())

    def _in_interval(self, t: float) -> bool:
        # float32 on both sides, as in the authors' code: of ten steps the one at 0.1 does not lie above 0.1.
        low, high = cast(list[float], torch.tensor(self.guidance_interval, dtype=torch.float32).tolist())
        return (t > low or low == 0.0) and t < high

    def _corrects(self, index: int) -> bool:
        """Whether a step looks at its end too."""
        return self.method == "heun" and index < self.steps - 1

    def _velocity(
        self, network: Network, z: Tensor, t: float, labels: Tensor, null_label: int, guide: Network | None
    ) -> Tensor:
        if not self.guides_at(t):
            return self._of(network, z, t, labels)
        if guide is not None:
            weak, strong = self._of(guide, z, t, labels), self._of(network, z, t, labels)
        else:
            both = torch.cat([labels, torch.full_like(labels, null_label)])
            strong, weak = self._of(network, torch.cat([z, z]), t, both).chunk(2)
        return weak + self.guidance_scale * (strong - weak)

    def _of(self, network: Network, z: Tensor, t: float, labels: Tensor) -> Tensor:
        """The velocity that a network predicts."""
        times = torch.full((len(z),), t, device=z.device)
        return to_spaces(network(z, times, labels).float(), z, times, self.prediction, self.t_eps).v
