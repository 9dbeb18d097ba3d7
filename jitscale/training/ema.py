"""Exponential moving averages of the fp32 master weights, kept in shards.

Every rank averages only the slices of the masters that it owns, so an average costs 4 bytes x parameters / ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from jitscale.config import ema_name


class ShardedEma:
    """Averages of one rank's flat master tensors.

    Attributes:
        sets: for each average (`ema_0.9999`, ...) one float32 tensor beside every flat master, of the same shape.
    """

    def __init__(self, decays: Sequence[float], masters: Sequence[torch.Tensor]) -> None:
        self._decays = {ema_name(decay): decay for decay in decays}
        self.sets = {name: [flat.detach().clone() for flat in masters] for name in self._decays}

    @torch.no_grad()
    def update(self, masters: Sequence[torch.Tensor]) -> None:
        """average <- decay * average + (1 - decay) * masters"""
        for name, decay in self._decays.items():
            torch._foreach_lerp_(self.sets[name], list(masters), 1.0 - decay)
