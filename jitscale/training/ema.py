"""Averages of the fp32 master weights, kept in shards.

Every rank averages only the slices of the masters that it owns, so an average costs 4 bytes x parameters / ranks. What
an update does is a function of the step's position in the run alone, so that a resumed run averages as the unbroken
one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from jitscale.checkpoints.power_averages import gamma_of_width, power_step
from jitscale.config import EmaConfig, ema_name, power_name


class ShardedEma:
    """Averages of one rank's flat master tensors.

    An average that is added in the middle of a run takes all weights before for what they were then.

    Attributes:
        sets: for each average (`ema_0.9999`, `power_0.050`, ...) one float32 tensor beside every flat master, of the
            same shape.
    """

    def __init__(self, settings: EmaConfig, masters: Sequence[torch.Tensor], *, compiled: bool = False) -> None:
        """Begin with the masters; `compiled` reads each of them once for all averages."""
        self._decays = {ema_name(decay): decay for decay in settings.decays}
        self._warmup = settings.warmup
        self._gammas = {power_name(width): gamma_of_width(width) for width in settings.power_widths}
        self._follow = torch.compile(_follow_at_once, dynamic=False) if compiled else _follow
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

        Args:
            masters: this rank's flat masters after the step.
            step: optimizer steps of the run, this one included.
            images: images that the run had seen before this step, and has seen after it.
            moved: False for a step that was skipped, which a GPU may know before the host does: a boolean (). Decays
                count steps that moved the weights; power functions weigh every image, with the weights as they were at
                it.
        """
        live = list(masters)
        # Weights on the device: the host does not wait to know whether the step was skipped.
        kind: dict[str, Any] = {"dtype": live[0].dtype, "device": live[0].device} if live else {}
        moved = torch.as_tensor(moved, **kind)
        weights = [moved * (1.0 - self._decay_at(decay, step)) for decay in self._decays.values()]
        weights += [torch.full((), power_step(gamma, *images), **kind) for gamma in self._gammas.values()]
        self._follow(list(self.sets.values()), live, weights)

    def _decay_at(self, decay: float, step: int) -> float:
        """The decay of a step: with warm-up that of TensorFlow's ExponentialMovingAverage(num_updates=step).

        It lets the average follow the weights while `step` is small against 9 / (1 - decay).
        """
        return min(decay, (1 + step) / (10 + step)) if self._warmup else decay


Averages = list[list[torch.Tensor]]


def _follow(averages: Averages, live: list[torch.Tensor], weights: list[torch.Tensor]) -> None:
    for average, weight in zip(averages, weights, strict=True):
        torch._foreach_lerp_(average, live, [weight] * len(live))


def _follow_at_once(averages: Averages, live: list[torch.Tensor], weights: list[torch.Tensor]) -> None:
    for average, weight in zip(averages, weights, strict=True):
        for mean, master in zip(average, live, strict=True):
            mean.lerp_(master, weight)
