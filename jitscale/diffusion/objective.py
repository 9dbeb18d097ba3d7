"""Forward process, prediction spaces and training loss (arXiv 2511.13720, section 3 and table 1).

z_t = t x + (1 - t) e with t = 1 clean and e ~ noise_scale * N(0, I); v = x - e. A network may predict x, e or v, and
the squared error may be taken in any of the three spaces. Every 1 / (1 - t) is 1 / max(1 - t, t_eps) and every 1 / t
is 1 / max(t, t_eps), in the prediction and in the target alike, so that the two agree when the network is perfect.

Shapes: B batch; images are (B, 3, height, width); times (B,).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from jitscale.config import DiffusionConfig


class Spaces(NamedTuple):
    """One prediction expressed in all three spaces, (B, 3, height, width) each."""

    x: Tensor
    e: Tensor
    v: Tensor


def per_image(t: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1)"""
    return t.view(-1, 1, 1, 1)


def interpolate(x: Tensor, e: Tensor, t: Tensor) -> Tensor:
    """z_t = t x + (1 - t) e"""
    t = per_image(t)
    return t * x + (1 - t) * e


def to_spaces(prediction: Tensor, z: Tensor, t: Tensor, space: str, t_eps: float) -> Spaces:
    """Express a `prediction` made in `space` (x, e or v) at noisy images `z` in all three spaces (paper, table 1)."""
    t = per_image(t)
    noise_share = (1 - t).clamp_min(t_eps)
    image_share = t.clamp_min(t_eps)
    if space == "x":
        x = prediction
        return Spaces(x, (z - t * x) / noise_share, (x - z) / noise_share)
    if space == "e":
        e = prediction
        return Spaces((z - (1 - t) * e) / image_share, e, (z - e) / image_share)
    v = prediction
    return Spaces(z + (1 - t) * v, z - t * v, v)


def sample_loss(prediction: Tensor, x: Tensor, e: Tensor, z: Tensor, t: Tensor, config: DiffusionConfig) -> Tensor:
    """Mean squared error over the pixels of each image, (B,), in float32, in the space `config.loss`.

    The target is the same map applied to the true image, noise or velocity: for x-prediction with v-loss it is
    (x - z) / max(1 - t, t_eps).
    """
    truth = Spaces(x, e, x - e)
    predicted = to_spaces(prediction.float(), z, t, config.prediction, config.t_eps)
    target = to_spaces(getattr(truth, config.prediction), z, t, config.prediction, config.t_eps)
    difference = getattr(predicted, config.loss) - getattr(target, config.loss)
    return difference.square().mean(dim=(1, 2, 3))


def times_from_normal(n: Tensor, config: DiffusionConfig) -> Tensor:
    """t = sigmoid(mu + sigma n) for standard normal `n` (paper, section 4.1: logit-normal times)."""
    return torch.sigmoid(config.mu + config.sigma * n)
