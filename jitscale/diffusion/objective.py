"""Forward process, prediction spaces and training loss (arXiv 2511.13720, section 3 and table 1).

z_t = t x + (1 - t) e, where t = 1 is clean and e ~ noise_scale * N(0, I); v = x - e. A network may predict x, e or v.
The loss is the squared error in any of these three spaces. Every 1 / (1 - t) is computed as 1 / max(1 - t, t_eps), and
every 1 / t as 1 / max(t, t_eps), both in the prediction and in the target, so that a perfect network has no loss.

A network may also predict x - S e, where S = P P^T projects each patch on a subspace of few dimensions (rank-asymmetric
prediction, arXiv 2605.12964). Inside the subspace this is v, outside of it x. Rank 0 is x-prediction, full rank is
v-prediction.

Shapes: B batch, A channels, N patches of an image, D numbers of a patch, R rank; images are (B, A, height, width);
times (B,).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from jitscale.config import DiffusionConfig


class Spaces(NamedTuple):
    """One prediction expressed in all three spaces, (B, A, height, width) each."""

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


def patches_of(images: Tensor, patch: int) -> Tensor:
    """(B, A, height, width) -> (B, N, D): patches of `patch` pixels per side, in the order row, column, channel."""
    blocks = images.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # (B, A, rows, P, columns, P)
    return blocks.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def images_of(patches: Tensor, patch: int, height: int) -> Tensor:
    """The inverse of `patches_of`, for images of this height."""
    blocks = patches.unflatten(2, (patch, patch, -1)).unflatten(1, (height // patch, -1))
    return blocks.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def project(images: Tensor, subspace: Tensor) -> Tensor:
    """Project each patch on the subspace that the orthonormal columns of `subspace` (D, R) span.

    Computed in float32 even under autocast, because the result is divided by 1 - t later.
    """
    patch = math.isqrt(subspace.shape[0] // images.shape[1])
    with torch.autocast(images.device.type, enabled=False):
        patches = patches_of(images, patch)
        return images_of(patches @ subspace @ subspace.T, patch, images.shape[2])


def to_spaces(
    prediction: Tensor, z: Tensor, t: Tensor, space: str, t_eps: float, subspace: Tensor | None = None
) -> Spaces:
    """Convert a `prediction` in `space`, for noisy images `z`, to all three spaces (paper, table 1).

    `space` is x, e, v or asym; asym needs the `subspace` (D, R).
    """
    t = per_image(t)
    noise_share = (1 - t).clamp_min(t_eps)
    image_share = t.clamp_min(t_eps)
    if space == "x":
        x = prediction
        return Spaces(x, (z - t * x) / noise_share, (x - z) / noise_share)
    if space == "e":
        e = prediction
        return Spaces((z - (1 - t) * e) / image_share, e, (z - e) / image_share)
    if space == "v":
        v = prediction
        return Spaces(z + (1 - t) * v, z - t * v, v)
    assert subspace is not None, "asym needs a subspace"
    o = prediction
    # v-prediction inside the subspace, x-prediction outside, each with its own clamp: rank 0 and full rank are exact.
    inside, z_inside = project(torch.stack([o, z]).flatten(0, 1), subspace).unflatten(0, (2, -1))
    outside, z_outside = o - inside, z - z_inside
    return Spaces(
        outside + z_inside + (1 - t) * inside,
        z_inside - t * inside + (z_outside - t * outside) / noise_share,
        inside + (outside - z_outside) / noise_share,
    )


def sample_loss(
    prediction: Tensor,
    x: Tensor,
    e: Tensor,
    z: Tensor,
    t: Tensor,
    config: DiffusionConfig,
    subspace: Tensor | None = None,
    counted: Tensor | None = None,
) -> Tensor:
    """The mean squared error over the pixels of each image, (B,), in float32, in the space `config.loss`.

    The target is the true image, noise or velocity, converted in the same way: for x-prediction with v-loss it is
    (x - z) / max(1 - t, t_eps). `subspace` (D, R) is needed for asym. If `counted` (B, 1, height, width) is given, only
    pixels where it is 1 count, the others are 0. Each image has the same number of them.
    """
    if config.prediction == "asym":
        assert subspace is not None, "asym needs a subspace"
        truth = x - project(e, subspace)
    else:
        truth = getattr(Spaces(x, e, x - e), config.prediction)
    predicted = to_spaces(prediction.float(), z, t, config.prediction, config.t_eps, subspace)
    target = to_spaces(truth, z, t, config.prediction, config.t_eps, subspace)
    difference = getattr(predicted, config.loss) - getattr(target, config.loss)
    if counted is None:
        return difference.square().mean(dim=(1, 2, 3))
    return (difference.square() * counted).mean(dim=(1, 2, 3)) / counted.mean(dim=(1, 2, 3))


def pixels_of(tokens: Tensor, image_size: int, patch: int) -> Tensor:
    """A mask, float32 (B, 1, image_size, image_size): 1 in the patches of `tokens` (B, K), 0 elsewhere."""
    grid = image_size // patch
    mask = torch.zeros(len(tokens), grid * grid, device=tokens.device).scatter(1, tokens, 1.0)
    rows = mask.view(-1, 1, grid, grid).repeat_interleave(patch, dim=2)
    return rows.repeat_interleave(patch, dim=3)


def times_from_normal(n: Tensor, config: DiffusionConfig) -> Tensor:
    """t = sigmoid(mu + sigma n) for standard normal `n` (paper, section 4.1: logit-normal times)."""
    return torch.sigmoid(config.mu + config.sigma * n)
