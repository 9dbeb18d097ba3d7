"""Small feature networks for the digits and the glyphs: Fréchet distances that a CPU can run.

Their weights are files of this repository, written by tools/train_features.py.

Shapes: B batch, F features, L logits.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from jitscale.evaluation.features import Embedding, FeatureNetwork

DIGITS_HELD_OUT = slice(0, None, 5)  # these of the 1,797 digits never train the network


class _PooledConvolutions(FeatureNetwork):
    """A small convolutional network whose features are the means of channels over the image: distances for a CPU.

    Every feature is scaled to variance 1 on the real images: none is dead, so that a few hundred images have a
    covariance of full rank, and the distance has a scale. Normalising over the batch in training and not over an image
    keeps the response to contrast, and pooling the response to noise and blur.
    """

    num_features = 64
    num_logits = 10
    channels: tuple[int, ...]  # of the image and the layers before the last one, which has `num_features`
    strides: tuple[int, ...]

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        widths = (*self.channels, self.num_features)
        for width_in, width_out, stride in zip(widths, widths[1:], self.strides, strict=False):
            convolution = nn.Conv2d(width_in, width_out, 3, stride, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(width_out), nn.ReLU()]
        self.trunk = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.scale = nn.BatchNorm1d(self.num_features, affine=False)
        self.classes = nn.Linear(self.num_features, self.num_logits)

    def embed(self, images: torch.Tensor) -> Embedding:
        if images.shape[2:] != (self.input_size, self.input_size):
            # Antialiased, or noise and edges of larger images would be sampled, not averaged.
            images = F.interpolate(images, self.input_size, mode="bicubic", align_corners=False, antialias=True)
        features = self.scale(self.trunk(images / 127.5 - 1.0))
        return Embedding(features, self.classes(features), features.new_empty(len(features), 0))


class DigitsFeatures(_PooledConvolutions):
    """For scikit-learn's handwritten digits, at 32 px whatever the resolution; 0.8 between halves of the real ones."""

    name = "digits"
    weights = Path(__file__).with_name("digits_features.safetensors")
    input_size = 32
    channels = (3, 16, 32, 56)
    strides = (1, 2, 2, 2)


class GlyphFeatures(_PooledConvolutions):
    """For the letters of `preparation.glyphs`, at 128 px: trained to tell letters and fonts, it sees a blurred edge."""

    name = "glyphs"
    weights = Path(__file__).with_name("glyphs_features.safetensors")
    input_size = 128
    channels = (3, 16, 32, 48)
    strides = (2, 2, 2, 2)


SMALL_NETWORKS = {network.name: network for network in (DigitsFeatures, GlyphFeatures)}  # by `Manifest.dataset` too
