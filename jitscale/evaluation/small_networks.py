"""Small feature networks for the digits and the glyphs: Fréchet distances that a CPU can compute.

Their weights are files of this repository, written by tools/train_features.py.

Shapes: B batch, F features, L logits.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from jitscale.evaluation.features import Embedding, FeatureNetwork

DIGITS_HELD_OUT = slice(0, None, 5)  # these of the 1,797 digits are not used to train the network


class _PooledConvolutions(FeatureNetwork):
    """A small convolutional network; its features are the means of channels over the image.

    Every feature is scaled to variance 1 on the real images. So no feature is dead, a few hundred images have a
    covariance of full rank, and the distance has a scale. In training, features are normalised over the batch, not over
    an image, so that they respond to contrast. Because of the pooling, they respond to noise and blur.
    """

    num_features = 64
    num_logits = 10
    channels: tuple[int, ...]  # channels of the image and of all layers except the last one, which has `num_features`
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
            # Antialiasing averages noise and edges of larger images, instead of sampling them.
            images = F.interpolate(images, self.input_size, mode="bicubic", align_corners=False, antialias=True)
        features = self.scale(self.trunk(images / 127.5 - 1.0))
        return Embedding(features, self.classes(features), features.new_empty(len(features), 0))


class DigitsFeatures(_PooledConvolutions):
    """For scikit-learn's handwritten digits, at 32 px for any resolution; 0.8 between halves of the real digits."""

    name = "digits"
    weights = Path(__file__).with_name("digits_features.safetensors")
    input_size = 32
    channels = (3, 16, 32, 56)
    strides = (1, 2, 2, 2)


class GlyphFeatures(_PooledConvolutions):
    """For the letters of `preparation.glyphs`, at 128 px. Trained to distinguish letters and fonts, it detects blur."""

    name = "glyphs"
    weights = Path(__file__).with_name("glyphs_features.safetensors")
    input_size = 128
    channels = (3, 16, 32, 48)
    strides = (2, 2, 2, 2)


SMALL_NETWORKS = {network.name: network for network in (DigitsFeatures, GlyphFeatures)}  # names as `Manifest.dataset`
