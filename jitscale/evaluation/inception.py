"""The InceptionV3 of published FIDs: TensorFlow's graph of 2015-12-05, with the weights of its port to PyTorch.

The network of Szegedy et al. 2016 (arXiv 1512.00567), with three differences that every FID in the literature has:
average pooling inside the blocks ignores the padding, the last block uses maximum pooling, and there are 1008 logits.
Modules have the names of the published weights, so that these load unchanged.

Shapes: B batch, C channels.
"""

import torch
import torch.nn.functional as F
from torch import nn

from jitscale.evaluation.features import Embedding, FeatureNetwork
from jitscale.evaluation.published import Published

SPATIAL_CHANNELS = 7
# The weights of the published FIDs.
RELEASE = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0"

Kernel = int | tuple[int, int]
Layer = tuple[int, Kernel] | tuple[int, Kernel, Kernel]  # channels, and one kernel or two with the same input


class BasicConv(nn.Module):
    """Convolution, batch norm with the statistics of its training, ReLU."""

    def __init__(self, width_in: int, width_out: int, kernel: Kernel, stride: int = 1, *, padded: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width_in, width_out, kernel, stride, "same" if padded else "valid", bias=False)
        self.bn = nn.BatchNorm2d(width_out, eps=0.001)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, width_out, H', W')"""
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """Branches of convolutions with the same input; their outputs are concatenated.

    Names are the published ones: a single layer has the name of its branch, several layers are numbered, and layers
    with the same input have letters. The branch `branch_pool` begins with pooling.
    """

    def __init__(self, width: int, pool: str = "average", stride: int = 1, **branches: list[Layer]) -> None:
        super().__init__()
        padding = 1 if stride == 1 else 0
        average = nn.AvgPool2d(3, stride, padding, count_include_pad=False)
        self.pool = nn.MaxPool2d(3, stride, padding) if pool == "maximum" else average
        self.branches: dict[str, list[list[str]]] = {}
        for branch, layers in branches.items():
            self.branches[branch] = []
            width_in = width
            for number, (width_out, *kernels) in enumerate(layers, start=1):
                name = branch if len(layers) == 1 else f"{branch}_{number}"
                names = [name] if len(kernels) == 1 else [f"{name}a", f"{name}b"]
                own_stride = stride if number == len(layers) else 1
                for layer, kernel in zip(names, kernels, strict=True):
                    self.add_module(layer, BasicConv(width_in, width_out, kernel, own_stride, padded=own_stride == 1))
                self.branches[branch].append(names)
                width_in = width_out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C', H / stride, W / stride), rounded down"""
        outputs = []
        for branch, layers in self.branches.items():
            found = [self.pool(x) if branch == "branch_pool" else x]
            for names in layers:
                found = [self.get_submodule(name)(found[0]) for name in names]
            outputs += found
        return torch.cat(outputs, 1)


def block_a(width: int, pooled: int) -> Mixed:
    """At 35 x 35: to 224 + `pooled` channels."""
    return Mixed(
        width,
        branch1x1=[(64, 1)],
        branch5x5=[(48, 1), (64, 5)],
        branch3x3dbl=[(64, 1), (96, 3), (96, 3)],
        branch_pool=[(pooled, 1)],
    )


def block_b(width: int) -> Mixed:
    """From 35 x 35 to 17 x 17: adds 480 channels."""
    return Mixed(width, "maximum", 2, branch3x3=[(384, 3)], branch3x3dbl=[(64, 1), (96, 3), (96, 3)], branch_pool=[])


def block_c(width: int, inner: int) -> Mixed:
    """At 17 x 17: to 768 channels; a kernel of 7 x 7 is a row and a column."""
    row, column = (1, 7), (7, 1)
    return Mixed(
        width,
        branch1x1=[(192, 1)],
        branch7x7=[(inner, 1), (inner, row), (192, column)],
        branch7x7dbl=[(inner, 1), (inner, column), (inner, row), (inner, column), (192, row)],
        branch_pool=[(192, 1)],
    )


def block_d(width: int) -> Mixed:
    """From 17 x 17 to 8 x 8: adds 512 channels."""
    large: list[Layer] = [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)]
    return Mixed(width, "maximum", 2, branch3x3=[(192, 1), (320, 3)], branch7x7x3=large, branch_pool=[])


def block_e(width: int, pool: str) -> Mixed:
    """At 8 x 8: to 2048 channels; two branches end in two parallel layers."""
    spread: Layer = (384, (1, 3), (3, 1))
    return Mixed(
        width,
        pool,
        branch1x1=[(320, 1)],
        branch3x3=[(384, 1), spread],
        branch3x3dbl=[(448, 1), (384, 3), spread],
        branch_pool=[(192, 1)],
    )


class Inception(FeatureNetwork):
    """Pool features (B, 2048), logits (B, 1008) without bias for the Inception Score, and spatial features for sFID.

    The spatial features (Nash et al. 2021, arXiv 2103.03841, as in the ADM evaluations) are the first 7 channels of the
    1 x 1 branch of the block mixed_6 of TensorFlow's graph: 17 x 17 x 7, in the order row, column, channel.
    """

    name = "inception"
    weights = Published(f"{RELEASE}/weights-inception-2015-12-05-6726825d.pth", "6726825d", "inception")
    num_features = 2048
    num_logits = 1008
    num_spatial = 17 * 17 * SPATIAL_CHANNELS
    input_size = 299

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = BasicConv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = BasicConv(32, 32, 3)
        self.Conv2d_2b_3x3 = BasicConv(32, 64, 3, padded=True)
        self.Conv2d_3b_1x1 = BasicConv(64, 80, 1)
        self.Conv2d_4a_3x3 = BasicConv(80, 192, 3)
        self.Mixed_5b = block_a(192, 32)
        self.Mixed_5c = block_a(256, 64)
        self.Mixed_5d = block_a(288, 64)
        self.Mixed_6a = block_b(288)
        self.Mixed_6b = block_c(768, 128)
        self.Mixed_6c = block_c(768, 160)
        self.Mixed_6d = block_c(768, 160)
        self.Mixed_6e = block_c(768, 192)
        self.Mixed_7a = block_d(768)
        self.Mixed_7b = block_e(1280, "average")
        self.Mixed_7c = block_e(2048, "maximum")
        self.fc = nn.Linear(2048, 1008)

    def embed(self, images: torch.Tensor) -> Embedding:
        """Resize like TensorFlow 1, scale by (x - 128) / 128, and apply the network."""
        x = (resize_as_tensorflow_1(images, self.input_size) - 128.0) / 128.0
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        spatial = self.Mixed_6d.get_submodule("branch1x1")(x)[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_6e(self.Mixed_6d(x))
        features = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))
        return Embedding(features, features @ self.fc.weight.T, spatial)


def resize_as_tensorflow_1(images: torch.Tensor, size: int) -> torch.Tensor:
    """Resize float32 `images` (B, 3, H, W) to `size` pixels per side, bilinearly, without antialiasing.

    It is tf.image.resize_bilinear without align_corners: pixel i of the result lies at i * (old / new) of the original.
    The statistics of every published FID were computed with it.
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
