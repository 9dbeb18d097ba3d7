"""The losses of a step: of the output layer, and of the middle output layer if the network has one.

Shapes: B images of a micro-batch, A channels, S pixels per side, K tokens that pass through the routed blocks.
"""

import torch

from jitscale.config import DiffusionConfig, ModelConfig, middle_is_routed
from jitscale.diffusion.objective import pixels_of, sample_loss


class Losses:
    """Computes losses from predictions; compiled if the blocks are."""

    def __init__(
        self, model: ModelConfig, diffusion: DiffusionConfig, subspace: torch.Tensor | None, *, compiled: bool
    ) -> None:
        """`subspace` is the network's, on the device."""
        self._model, self._diffusion, self._subspace = model, diffusion, subspace
        self._sample_loss = torch.compile(sample_loss) if compiled else sample_loss

    def __call__(
        self,
        prediction: torch.Tensor,
        x: torch.Tensor,
        e: torch.Tensor,
        z: torch.Tensor,
        t: torch.Tensor,
        kept: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The losses (B,) of the output layer and of the middle output layer (None without one).

        `prediction` is (B, A, S, S), or (2, B, A, S, S) with a middle output layer. If that layer lies among routed
        blocks, it has seen only the tokens `kept` (B, K), so that only their pixels count.
        """
        truth = (x, e, z, t, self._diffusion, self._subspace)
        if self._model.middle_head == 0:
            return self._sample_loss(prediction, *truth), None
        final, middle = prediction
        counted = None
        if kept is not None and middle_is_routed(self._model):
            counted = pixels_of(kept, self._model.image_size, self._model.patch_size)
        return self._sample_loss(final, *truth), self._sample_loss(middle, *truth, counted)
