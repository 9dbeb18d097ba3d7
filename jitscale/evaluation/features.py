"""Networks that turn images into the features and class logits every metric is computed from.

Shapes: B batch, F features, L logits; images are (B, 3, height, width).
A network brings its own resize and takes uint8 only, so that two evaluations of the same images cannot differ by their
preprocessing. The hash of its weights belongs into every result: distances of different networks do not compare.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from jitscale.errors import UserError

DIGITS_WEIGHTS = Path(__file__).with_name("digits_features.safetensors")
GLYPHS_WEIGHTS = Path(__file__).with_name("glyphs_features.safetensors")
DIGITS_HELD_OUT = slice(0, None, 5)  # these of the 1,797 digits never train the network


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Images as they are written to files: rounded to the nearest of 256 levels, as the authors do, not truncated.

    Args:
        images: (B, 3, height, width) floating point, nominally in [-1, 1]; what lies outside is clamped.

    Returns:
        (B, 3, height, width) uint8.

    Raises:
        ValueError: another shape or dtype, or values that are not finite; the message has their batch indices.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"expected (B, 3, height, width) floating point, got {tuple(images.shape)} {images.dtype}")
    broken = (~images.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if broken:
        raise ValueError(f"images with values that are not finite, at batch indices {broken}")
    return (images.float().clamp(-1.0, 1.0) * 127.5 + 127.5).round().to(torch.uint8)


class FeatureNetwork(nn.Module):
    """What a feature network has to bring: the attributes, and `embed`.

    Attributes:
        name: its key in `FEATURE_NETWORKS`.
        num_features: F.
        num_logits: L.
        input_size: side in pixels to which every image is resized.
        weights_sha256: hex digest of the weights file; empty while the weights are random.
    """

    name: str
    num_features: int
    num_logits: int
    input_size: int
    weights_sha256: str = ""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (B, F) and logits (B, L), float32, of uint8 `images` (B, 3, height, width) of any size.

        Raises:
            ValueError: images of another shape or dtype.
        """
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
            raise ValueError(f"expected (B, 3, height, width) uint8, got {tuple(images.shape)} {images.dtype}")
        with torch.autocast(images.device.type, enabled=False):  # the caller's precision is no part of a protocol
            return self.embed(images.float())

    def embed(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Resize and scale float32 images in [0, 255], then apply the network."""
        raise NotImplementedError


class _PooledConvolutions(FeatureNetwork):
    """A small convolutional network whose features are the means of channels over the image: distances for a CPU.

    Every feature is scaled to variance 1 on the real images: none is dead, so that a few hundred images have a
    covariance of full rank, and the distance has a scale. Normalising over the batch in training and not over an image
    keeps the response to contrast, and pooling the response to noise and blur.
    """

    channels: tuple[int, ...]  # of the layers, the image's first
    strides: tuple[int, ...]

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width_in, width_out, stride in zip(self.channels, self.channels[1:], self.strides, strict=False):
            layers += [
                nn.Conv2d(width_in, width_out, 3, stride, padding=1, bias=False),
                nn.BatchNorm2d(width_out),
                nn.ReLU(),
            ]
        self.trunk = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.scale = nn.BatchNorm1d(self.num_features, affine=False)
        self.classes = nn.Linear(self.num_features, self.num_logits)

    def embed(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        size = (self.input_size, self.input_size)
        if images.shape[2:] != size:
            # Antialiased, or noise and edges of larger images would be sampled, not averaged.
            images = F.interpolate(images, size=size, mode="bicubic", align_corners=False, antialias=True)
        features = self.scale(self.trunk(images / 127.5 - 1.0))
        return features, self.classes(features)


class DigitsFeatures(_PooledConvolutions):
    """For scikit-learn's handwritten digits, at 32 px whatever the resolution; 0.8 between halves of the real ones."""

    name = "digits"
    num_features = 64
    num_logits = 10
    input_size = 32
    channels = (3, 16, 32, 56, num_features)
    strides = (1, 2, 2, 2)


class GlyphFeatures(_PooledConvolutions):
    """For the letters of data/glyphs.py, at 128 px: trained to tell letters and fonts, it sees what blurs an edge."""

    name = "glyphs"
    num_features = 64
    num_logits = 10
    input_size = 128
    channels = (3, 16, 32, 48, num_features)
    strides = (2, 2, 2, 2)


def _with_stored_weights(network: FeatureNetwork, path: Path) -> FeatureNetwork:
    """The network with the weights of this repository (written by tools/train_features.py).

    Raises:
        UserError: the file is missing or is not this network's.
    """
    try:
        content = path.read_bytes()
        network.load_state_dict(safetensors.torch.load(content))
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot load {path}: {reason}; reinstall jitscale or restore the file") from error
    network.weights_sha256 = hashlib.sha256(content).hexdigest()
    return network


FEATURE_NETWORKS: dict[str, Callable[[], FeatureNetwork]] = {
    "digits": lambda: _with_stored_weights(DigitsFeatures(), DIGITS_WEIGHTS),
    "glyphs": lambda: _with_stored_weights(GlyphFeatures(), GLYPHS_WEIGHTS),
}


def load_feature_network(name: str, device: torch.device | str) -> FeatureNetwork:
    """The feature network `name` with its weights on `device`, in evaluation mode and without gradients.

    Raises:
        UserError: there is no such network, or its weights cannot be read.
    """
    if name not in FEATURE_NETWORKS:
        raise UserError(f"unknown feature network {name!r}; there are: {', '.join(sorted(FEATURE_NETWORKS))}")
    return FEATURE_NETWORKS[name]().to(device).eval().requires_grad_(False)
