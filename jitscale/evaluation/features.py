"""Networks that turn images into the features and class logits every metric is computed from.

Shapes: B batch, F features, L logits, R spatial features; images are (B, A, height, width), of
A = 3 channels or one, which networks see three times.
A network brings its own resize and takes uint8 only, so that two evaluations of the same images cannot differ by their
preprocessing. The hash of its weights belongs into every result: distances of different networks do not compare.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from jitscale.config import CHANNELS, RGB
from jitscale.errors import UserError
from jitscale.evaluation.published import Published

EXPECTED = "(B, 3, height, width) or (B, 1, height, width)"


@contextmanager
def without_tf32() -> Iterator[None]:
    """Matrix products and convolutions in full float32."""
    products, convolutions = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = products, convolutions


def to_uint8(images: torch.Tensor, ids: Sequence[int] | None = None) -> torch.Tensor:
    """Images as they are written to files: rounded to the nearest of 256 levels, as the authors do, not truncated.

    From (B, A, height, width) floating point, clamped to [-1, 1], to uint8. Raises a ValueError at another shape or
    dtype, and a UserError at values that are not finite: it calls the images by `ids`, or by their batch indices.
    """
    if not _are_images(images) or not images.is_floating_point():
        raise ValueError(f"expected {EXPECTED} floating point, got {tuple(images.shape)} {images.dtype}")
    broken = (~images.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if broken:
        named = ", ".join(str(index if ids is None else ids[index]) for index in broken)
        cause = "are these weights of a training that went astray, or is the guidance scale too large?"
        raise UserError(f"generated images with values that are not finite, ids {named}; {cause}")
    return (images.float().clamp(-1.0, 1.0) * 127.5 + 127.5).round().to(torch.uint8)


def as_pictures(images: torch.Tensor) -> npt.NDArray[np.uint8]:
    """uint8 `images` (B, A, height, width) as Pillow takes them: (B, height, width, 3), or (B, height, width)."""
    last = images.permute(0, 2, 3, 1) if images.shape[1] == RGB else images.squeeze(1)
    return np.ascontiguousarray(last.cpu().numpy())


def _are_images(images: torch.Tensor) -> bool:
    return images.ndim == 4 and images.shape[1] in CHANNELS


class Embedding(NamedTuple):
    """What a network says about images, float32; of width 0 what it does not give."""

    features: torch.Tensor  # (B, F)
    logits: torch.Tensor  # (B, L)
    spatial: torch.Tensor  # (B, R), of a layer that knows where things are


class FeatureNetwork(nn.Module):
    """What a feature network has to bring: the attributes, and `embed`."""

    name: str  # as `evaluation.features` knows it
    weights: Path | Published  # the file of this repository, or the published one
    num_features: int  # F
    num_logits: int = 0  # L
    num_spatial: int = 0  # R
    input_size: int  # side in pixels to which every image is resized

    def forward(self, images: torch.Tensor) -> Embedding:
        """Embed uint8 `images` (B, A, height, width) of any size. Raises a ValueError at another shape or dtype."""
        if not _are_images(images) or images.dtype != torch.uint8:
            raise ValueError(f"expected {EXPECTED} uint8, got {tuple(images.shape)} {images.dtype}")
        # The caller's precision is no part of a protocol, and TF32 would change every distance on newer GPUs.
        with torch.autocast(images.device.type, enabled=False), without_tf32():
            return self.embed(images.expand(-1, RGB, -1, -1).float())

    def embed(self, images: torch.Tensor) -> Embedding:
        """Resize and scale float32 images (B, 3, height, width) in [0, 255], then apply the network."""
        raise NotImplementedError
