"""Networks that turn images into the features and class logits every metric is computed from.

Shapes: B batch, F features, L logits, R spatial features; images are (B, 3, height, width).
A network brings its own resize and takes uint8 only, so that two evaluations of the same images cannot differ by their
preprocessing. The hash of its weights belongs into every result: distances of different networks do not compare.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from jitscale.errors import UserError
from jitscale.evaluation.published import Published


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

    From (B, 3, height, width) floating point, clamped to [-1, 1], to uint8. Raises a ValueError at another shape or
    dtype, and a UserError at values that are not finite: it calls the images by `ids`, or by their batch indices.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"expected (B, 3, height, width) floating point, got {tuple(images.shape)} {images.dtype}")
    broken = (~images.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if broken:
        named = ", ".join(str(index if ids is None else ids[index]) for index in broken)
        cause = "are these weights of a training that went astray, or is the guidance scale too large?"
        raise UserError(f"generated images with values that are not finite, ids {named}; {cause}")
    return (images.float().clamp(-1.0, 1.0) * 127.5 + 127.5).round().to(torch.uint8)


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
        """Embed uint8 `images` (B, 3, height, width) of any size. Raises a ValueError at another shape or dtype."""
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
            raise ValueError(f"expected (B, 3, height, width) uint8, got {tuple(images.shape)} {images.dtype}")
        # The caller's precision is no part of a protocol, and TF32 would change every distance on newer GPUs.
        with torch.autocast(images.device.type, enabled=False), without_tf32():
            return self.embed(images.float())

    def embed(self, images: torch.Tensor) -> Embedding:
        """Resize and scale float32 images in [0, 255], then apply the network."""
        raise NotImplementedError
