"""Presents weights as those of a network with another middle output layer, or without one.

No other parameter depends on that layer, so the final prediction stays the same, bit by bit.
"""

from dataclasses import replace

import torch

from jitscale.checkpoints.weights import MOMENTS, StoredWeights, shapes_of
from jitscale.config import Config

PREFIX = "middle_layer."


def with_middle_layer_of(stored: StoredWeights, config: Config) -> tuple[StoredWeights, str | None]:
    """`stored` with the middle output layer of `config` (`model.middle_head`), and a line for the log about the change.

    If the layer is missing, it is the initial one, whose prediction is zero. If `config` has none, the stored one is
    left out. If both have it after the same block, the result is `stored` itself, and None.
    """
    before, now = stored.config.model.middle_head, config.model.middle_head
    has_layer = any(name.startswith(PREFIX) for name in stored.shapes)
    if before == now and has_layer == (now > 0):
        return stored, None
    left_out = ["its middle output layer is left out"] if has_layer else []
    added = [f"the one of model.middle_head={now} begins with a prediction of zero"] if now > 0 else []
    if added and not has_layer:
        added = [f"it has no middle output layer; {added[0]}"]
    return _OtherMiddleLayer(stored, now), f"{stored.path}: {'; '.join(left_out + added)}"


class _OtherMiddleLayer(StoredWeights):
    """All sets of other weights, moments included, with an initial middle output layer or none."""

    def __init__(self, stored: StoredWeights, middle_head: int) -> None:
        self._stored = stored
        self.path, self.weight_sets, self.default = stored.path, stored.weight_sets, stored.default
        self.optimizer_step = stored.optimizer_step
        self.config = replace(stored.config, model=replace(stored.config.model, middle_head=middle_head))
        kept = {name: shape for name, shape in stored.shapes.items() if not name.startswith(PREFIX)}
        self._initial = {name: shape for name, shape in shapes_of(self.config).items() if name.startswith(PREFIX)}
        self.shapes = kept | self._initial

    def verify(self, share: int = 0, shares: int = 1) -> None:
        """See `StoredWeights`."""
        self._stored.verify(share, shares)

    def caution(self, set_name: str) -> str | None:
        """See `StoredWeights`."""
        return self._stored.caution(set_name)

    def tensor(self, set_name: str, parameter: str) -> torch.Tensor:
        """See `StoredWeights`."""
        if parameter not in self._initial:
            return self._stored.tensor(set_name, parameter)
        is_norm = parameter.endswith("norm_final.weight") and set_name not in MOMENTS
        return torch.full(self._initial[parameter], float(is_norm))  # as `JiT.initialize` leaves it

    def read(self, set_name: str, parameter: str, start: int, stop: int) -> torch.Tensor:
        """See `StoredWeights`."""
        if parameter in self._initial:
            return self.tensor(set_name, parameter).flatten()[start:stop]
        return self._stored.read(set_name, parameter, start, stop)
