"""EMA weights of the fp32 masters, split across ranks.

Every rank averages only the slices of the masters that it owns, so an average costs 4 bytes x parameters / ranks. An
update depends only on the weights and on the step's position in the run, so a resumed run has the same averages as an
unbroken one.
"""

from collections.abc import Sequence
from typing import Any

import torch

from jitscale.checkpoints.power_averages import gamma_of_width, power_step
from jitscale.config import EmaConfig, ema_name, power_name

# The update is compiled for at most this number of flat tensors. Stages 1 to 3 have few: a group of the optimizer, or
# 1e9 elements. One kernel for each flat tensor then updates all its averages: for three averages it moves 28 bytes a
# parameter. Stage 0, which is for comparison, has one flat tensor for each parameter: for 60 of them Inductor made 180
# kernels and took minutes.
MOST_COMPILED = 16


class ShardedEma:
    """Averages of one rank's flat masters. An average added in the middle of a run starts from the current weights."""

    def __init__(self, settings: EmaConfig, masters: Sequence[torch.Tensor], *, compiled: bool = False) -> None:
        """Start from the masters. If `compiled` and the masters are few, each is read once for all averages."""
        self._decays = {ema_name(decay): decay for decay in settings.decays}
        self._warmup = settings.warmup
        self._gammas = {power_name(width): gamma_of_width(width) for width in settings.power_widths}
        compiled = compiled and len(masters) <= MOST_COMPILED
        self._follow = torch.compile(_follow_at_once, dynamic=False) if compiled else _follow
        # For each average (`ema_0.9999`, `power_0.050`, ...): a float32 tensor for each flat master, of the same shape.
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

        `step` counts the steps of the run, this one included. `images` are the images seen before and after it.

        `moved` () is False for a skipped step; it may be a boolean on a GPU, which the host has not read yet. Skipped
        steps do not update the EMA. A power-function average weighs every image, with the weights of its step.
        """
        live = list(masters)
        # `weights` stay on the device, so that the host need not wait to learn whether the step was skipped.
        kind: dict[str, Any] = {"dtype": live[0].dtype, "device": live[0].device} if live else {}
        moved = torch.as_tensor(moved, **kind)
        # The warm-up of TensorFlow's ExponentialMovingAverage(num_updates=step): the decay is smaller while `step` is
        # small compared with 9 / (1 - decay).
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
