"""The base of feature networks, which compute the features and class logits of images that metrics need.

A network does its own resizing and accepts only uint8, so that two evaluations of the same images have the same
preprocessing. The hash of its weights is part of every result, because distances of different networks are not
comparable.

Shapes: B batch, F features, L logits, R spatial features; images are (B, A, height, width) with A = 3 channels, or one,
which is repeated three times.
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
    """Compute matrix products and convolutions in full float32."""
    products, convolutions = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = products, convolutions


def to_uint8(images: torch.Tensor, ids: Sequence[int] | None = None) -> torch.Tensor:
    """Convert floating-point images (B, A, height, width) to uint8: clamp to [-1, 1], then round to 256 levels.

    The authors round too, instead of truncating. Raises a ValueError at another shape or dtype. Raises a UserError at
    values that are not finite; it names the images by `ids`, or by their batch indices.
    """
    if not _are_images(images) or not images.is_floating_point():
        raise ValueError(f"expected {EXPECTED} floating point, got {tuple(images.shape)} {images.dtype}")
    broken = (~images.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if broken:
        named = ", ".join(str(index if ids is None else ids[index]) for index in broken)
        cause = "did the training of these weights diverge, or is the guidance scale too large?"
        raise UserError(f"generated images with values that are not finite, ids {named}; {cause}")
    return (images.float().clamp(-1.0, 1.0) * 127.5 + 127.5).round().to(torch.uint8)


def as_pictures(images: torch.Tensor) -> npt.NDArray[np.uint8]:
    """uint8 `images` (B, A, height, width) in Pillow's layout: (B, height, width, 3), or (B, height, width)."""
    last = images.permute(0, 2, 3, 1) if images.shape[1] == RGB else images.squeeze(1)
    return np.ascontiguousarray(last.cpu().numpy())


def _are_images(images: torch.Tensor) -> bool:
    return images.ndim == 4 and images.shape[1] in CHANNELS


class Embedding(NamedTuple):
    """The outputs of a network for images, float32; an output that the network lacks has width 0."""

    features: torch.Tensor  # (B, F)
    logits: torch.Tensor  # (B, L)
    spatial: torch.Tensor  # (B, R), of a layer before spatial pooling


class FeatureNetwork(nn.Module):
    """Base class of feature networks. A subclass defines the attributes and `embed`."""

    name: str  # its name in `evaluation.features`
    weights: Path | Published  # a file of this repository, or a published one
    num_features: int  # F
    num_logits: int = 0  # L
    num_spatial: int = 0  # R
    input_size: int  # every image is resized to this number of pixels per side

    def forward(self, images: torch.Tensor) -> Embedding:
        """Embed uint8 `images` (B, A, height, width) of any size. Raises a ValueError at another shape or dtype."""
        if not _are_images(images) or images.dtype != torch.uint8:
            raise ValueError(f"expected {EXPECTED} uint8, got {tuple(images.shape)} {images.dtype}")
        # Always float32: a distance must not depend on the caller's precision, and TF32 of newer GPUs would change it.
        with torch.autocast(images.device.type, enabled=False), without_tf32():
            return self.embed(images.expand(-1, RGB, -1, -1).float())

    def embed(self, images: torch.Tensor) -> Embedding:
        """Resize and scale float32 images (B, 3, height, width) in [0, 255], then apply the network."""
        raise NotImplementedError
