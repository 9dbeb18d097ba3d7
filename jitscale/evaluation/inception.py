"""InceptionV3 as published FIDs are computed with it: TensorFlow's graph of 2015-12-05, by its port to PyTorch.

Szegedy et al. 2016 (arXiv 1512.00567) with three differences that every FID in the literature contains: average pooling
inside the blocks leaves the padding out, the last block pools by maximum, and there are 1008 logits. Modules are named
as in the published weights, so that these load as they are.

Shapes: B batch, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from jitscale.evaluation.features import Embedding, FeatureNetwork
from jitscale.evaluation.published import Published

SPATIAL_CHANNELS = 7


class BasicConv(nn.Module):
    """Convolution, batch norm with the statistics of the training, ReLU."""

    def __init__(self, width_in: int, width_out: int, kernel: int | tuple[int, int], **layout: int | tuple[int, int]):
        super().__init__()
        self.conv = nn.Conv2d(width_in, width_out, kernel, bias=False, **layout)  # type: ignore[arg-type]
        self.bn = nn.BatchNorm2d(width_out, eps=0.001)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to (B, width_out, H', W')."""
        return F.relu(self.bn(self.conv(x)), inplace=True)


def _average(x: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class BlockA(nn.Module):
    """35 x 35: branches of 1, 5 and twice 3."""

    def __init__(self, width: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = BasicConv(width, 64, 1)
        self.branch5x5_1 = BasicConv(width, 48, 1)
        self.branch5x5_2 = BasicConv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = BasicConv(width, 64, 1)
        self.branch3x3dbl_2 = BasicConv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = BasicConv(96, 96, 3, padding=1)
        self.branch_pool = BasicConv(width, pooled, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, 35, 35) to (B, 224 + pooled, 35, 35)."""
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        branches = [self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), double, self.branch_pool(_average(x))]
        return torch.cat(branches, 1)


class BlockB(nn.Module):
    """35 x 35 to 17 x 17."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch3x3 = BasicConv(width, 384, 3, stride=2)
        self.branch3x3dbl_1 = BasicConv(width, 64, 1)
        self.branch3x3dbl_2 = BasicConv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = BasicConv(96, 96, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, 35, 35) to (B, 480 + C, 17, 17)."""
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], 1)


class BlockC(nn.Module):
    """17 x 17: 7 x 7 kernels as a row and a column."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        row: dict[str, tuple[int, int]] = {"padding": (0, 3)}
        column: dict[str, tuple[int, int]] = {"padding": (3, 0)}
        self.branch1x1 = BasicConv(width, 192, 1)
        self.branch7x7_1 = BasicConv(width, inner, 1)
        self.branch7x7_2 = BasicConv(inner, inner, (1, 7), **row)
        self.branch7x7_3 = BasicConv(inner, 192, (7, 1), **column)
        self.branch7x7dbl_1 = BasicConv(width, inner, 1)
        self.branch7x7dbl_2 = BasicConv(inner, inner, (7, 1), **column)
        self.branch7x7dbl_3 = BasicConv(inner, inner, (1, 7), **row)
        self.branch7x7dbl_4 = BasicConv(inner, inner, (7, 1), **column)
        self.branch7x7dbl_5 = BasicConv(inner, 192, (1, 7), **row)
        self.branch_pool = BasicConv(width, 192, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 768, 17, 17) to the same."""
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(_average(x))], 1)


class BlockD(nn.Module):
    """17 x 17 to 8 x 8."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch3x3_1 = BasicConv(width, 192, 1)
        self.branch3x3_2 = BasicConv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = BasicConv(width, 192, 1)
        self.branch7x7x3_2 = BasicConv(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = BasicConv(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = BasicConv(192, 192, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 768, 17, 17) to (B, 1280, 8, 8)."""
        large = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), large, F.max_pool2d(x, 3, stride=2)], 1)


class BlockE(nn.Module):
    """8 x 8: branches that spread; `pools_by_maximum` in the last one, as in TensorFlow's graph."""

    def __init__(self, width: int, *, pools_by_maximum: bool) -> None:
        super().__init__()
        self.branch1x1 = BasicConv(width, 320, 1)
        self.branch3x3_1 = BasicConv(width, 384, 1)
        self.branch3x3_2a = BasicConv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = BasicConv(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = BasicConv(width, 448, 1)
        self.branch3x3dbl_2 = BasicConv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = BasicConv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = BasicConv(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = BasicConv(width, 192, 1)
        self.pools_by_maximum = pools_by_maximum

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, 8, 8) to (B, 2048, 8, 8)."""
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.pools_by_maximum else _average(x)
        branches = [
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(pooled),
        ]
        return torch.cat(branches, 1)


class Inception(FeatureNetwork):
    """Pool features (B, 2048), logits (B, 1008) without bias, as the Inception Score takes them, and spatial features.

    Those of sFID (Nash et al. 2021, arXiv 2103.03841, as the ADM evaluations compute it): the first 7 channels of the
    1 x 1 branch of the block that TensorFlow's graph calls mixed_6, 17 x 17 x 7 in the order row, column, channel.
    """

    name = "inception"
    # With which published FIDs are computed (toshas/torch-fidelity).
    weights = Published(
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        "6726825d",
        "inception",
    )
    num_features = 2048
    num_logits = 1008
    num_spatial = 17 * 17 * SPATIAL_CHANNELS
    input_size = 299

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = BasicConv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = BasicConv(32, 32, 3)
        self.Conv2d_2b_3x3 = BasicConv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = BasicConv(64, 80, 1)
        self.Conv2d_4a_3x3 = BasicConv(80, 192, 3)
        self.Mixed_5b = BlockA(192, 32)
        self.Mixed_5c = BlockA(256, 64)
        self.Mixed_5d = BlockA(288, 64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b = BlockC(768, 128)
        self.Mixed_6c = BlockC(768, 160)
        self.Mixed_6d = BlockC(768, 160)
        self.Mixed_6e = BlockC(768, 192)
        self.Mixed_7a = BlockD(768)
        self.Mixed_7b = BlockE(1280, pools_by_maximum=False)
        self.Mixed_7c = BlockE(2048, pools_by_maximum=True)
        self.fc = nn.Linear(2048, 1008)

    def embed(self, images: torch.Tensor) -> Embedding:
        """Resize as TensorFlow 1 did, scale by (x - 128) / 128, and apply the network."""
        x = (resize_as_tensorflow_1(images, self.input_size) - 128.0) / 128.0
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        spatial = self.Mixed_6d.branch1x1(x)[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_6e(self.Mixed_6d(x))
        features = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))
        return Embedding(features, features @ self.fc.weight.T, spatial)


def resize_as_tensorflow_1(images: torch.Tensor, size: int) -> torch.Tensor:
    """Bilinear interpolation with corners at corners' start, and no average where images are made smaller.

    tf.image.resize_bilinear without align_corners: pixel i of the result lies at i * (old / new) of the original. The
    statistics of every published FID were computed with it.

    Args:
        images: (B, 3, H, W) float32.
        size: pixels a side of the result.
    """
    for axis in (2, 3):
        length = images.shape[axis]
        if length == size:
            continue
        at = torch.arange(size, dtype=torch.float32, device=images.device) * (length / size)
        low = at.floor()
        share = at - low
        first = low.long()
        second = (first + 1).clamp(max=length - 1)
        if axis == 2:
            share = share[:, None]
        before, after = images.index_select(axis, first), images.index_select(axis, second)
        images = before + (after - before) * share
    return images
