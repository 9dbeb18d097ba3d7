"""EMA weights of the fp32 masters, split across ranks.

Every rank averages only the slices of the masters that it owns, so an average costs 4 bytes x parameters / ranks. An
update is a function of the step's position in the run alone, so a resumed run averages as the unbroken one does.
"""

from collections.abc import Sequence
from typing import Any

import torch

from jitscale.checkpoints.power_averages import gamma_of_width, power_step
from jitscale.config import EmaConfig, ema_name, power_name

# Flats; stages 1 to 3 have few (a group of the optimizer, 1e9 elements). One kernel for each of them follows it with
# all averages: 28 bytes a parameter for three. Of 60 flats Inductor made 180 kernels, in minutes; stage 0, which
# is there to compare, has one for each parameter.
MOST_COMPILED = 16


class ShardedEma:
    """Averages of one rank's flat masters; one added in the middle of a run begins with the weights it finds."""

    def __init__(self, settings: EmaConfig, masters: Sequence[torch.Tensor], *, compiled: bool = False) -> None:
        """Begin with the masters; `compiled` reads each of them once for all averages, where they are few."""
        self._decays = {ema_name(decay): decay for decay in settings.decays}
        self._warmup = settings.warmup
        self._gammas = {power_name(width): gamma_of_width(width) for width in settings.power_widths}
        compiled = compiled and len(masters) <= MOST_COMPILED
        self._follow = torch.compile(_follow_at_once, dynamic=False) if compiled else _follow
        # For each average (`ema_0.9999`, `power_0.050`, ...) a float32 tensor for each flat master, of its shape.
        self.sets = {name: [flat.detach().clone() for flat in masters] for name in (*self._decays, *self._gammas)}

    @property
    def power_sets(self) -> dict[str, list[torch.Tensor]]:
        """The power-function averages among `sets`."""
        return {name: self.sets[name] for name in self._gammas}

    @torch.no_grad()
    def update(
        self, masters: Sequence[torch.Tensor], step: int, images: tuple[int, int], *, moved: torch.Tensor | bool = True
    ) -> None:
        """average <- decay * average + (1 - decay) * masters

        The run has taken `step` steps, this one included, and has seen these `images` before and after it. `moved`, a
        boolean () that a GPU may know before the host does, is False for a skipped step: decays count only steps that
        moved the weights, and power functions weigh every image with the weights of its step.
        """
        live = list(masters)
        # The weights of the averages are on the device: the host does not wait to know whether the step was skipped.
        kind: dict[str, Any] = {"dtype": live[0].dtype, "device": live[0].device} if live else {}
        moved = torch.as_tensor(moved, **kind)
        # Warm-up as in TensorFlow's ExponentialMovingAverage(num_updates=step): an average follows the weights while
        # `step` is small against 9 / (1 - decay).
        largest = (1 + step) / (10 + step) if self._warmup else 1.0
        weights = [moved * (1.0 - min(decay, largest)) for decay in self._decays.values()]
        weights += [torch.full((), power_step(gamma, *images), **kind) for gamma in self._gammas.values()]
        self._follow(list(self.sets.values()), live, weights)


Tensors = list[torch.Tensor]


def _follow(averages: list[Tensors], live: Tensors, weights: Tensors) -> None:
    for average, weight in zip(averages, weights, strict=True):
        torch._foreach_lerp_(average, live, [weight] * len(live))


def _follow_at_once(averages: list[Tensors], live: Tensors, weights: Tensors) -> None:
    for average, weight in zip(averages, weights, strict=True):
        for mean, master in zip(average, live, strict=True):
            mean.lerp_(master, weight)
