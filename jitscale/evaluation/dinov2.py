"""DINOv2's ViT-L/14, for the Fréchet distance in its features, FD-DINOv2 (Stein et al. 2023, arXiv 2306.04675).

Oquab et al. 2023 (arXiv 2304.07193). Modules have the names of the published weights, so that these load unchanged.

Shapes: B batch, N tokens (the class token first), C width.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from jitscale.evaluation.features import Embedding, FeatureNetwork
from jitscale.evaluation.published import Published

PATCH = 14
TRAINED_GRID = 37  # patches per side in the position embeddings: 518 px
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEVIATION = (0.229, 0.224, 0.225)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, C) -> (B, N, C)"""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = _Attention(width, heads)
        self.ls1 = nn.ParameterDict({"gamma": torch.ones(width)})  # a factor for each channel (Touvron et al. 2021)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        layers = {"fc1": nn.Linear(width, 4 * width), "gelu": nn.GELU(), "fc2": nn.Linear(4 * width, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.ls2 = nn.ParameterDict({"gamma": torch.ones(width)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, C) -> (B, N, C)"""
        x = x + self.attn(self.norm1(x)) * self.ls1["gamma"]
        return x + self.mlp(self.norm2(x)) * self.ls2["gamma"]


class DinoV2(FeatureNetwork):
    """The normalised class token (B, 1024) of images resized to 224 px, bicubic and antialiased."""

    name = "dinov2"
    # Its authors publish no hash. Results contain the hash of the file that was used.
    weights = Published("https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth", "", "dinov2")
    num_features = 1024
    input_size = 224

    def __init__(self, width: int = 1024, depth: int = 24, heads: int = 16) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + TRAINED_GRID**2, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))  # for training only, but in the published file
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, width, PATCH, PATCH)))
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def embed(self, images: torch.Tensor) -> Embedding:
        """Resize, normalise by ImageNet's mean and deviation, and apply the network."""
        x = F.interpolate(images, self.input_size, mode="bicubic", align_corners=False, antialias=True) / 255.0
        mean, deviation = (x.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_DEVIATION))
        tokens = self.patch_embed((x - mean) / deviation).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], 1) + self._positions()
        for block in self.blocks:
            tokens = block(tokens)
        features = self.norm(tokens)[:, 0]
        nothing = features.new_empty(len(features), 0)
        return Embedding(features, nothing, nothing)

    def _positions(self) -> torch.Tensor:
        """(1, N, C), resampled as in the published code: with the factor for 0.1 patches more, without antialiasing."""
        grid = self.input_size // PATCH
        factor = (grid + 0.1) / TRAINED_GRID
        trained = self.pos_embed[:, 1:].unflatten(1, (TRAINED_GRID, TRAINED_GRID)).permute(0, 3, 1, 2)
        resampled = F.interpolate(trained, scale_factor=(factor, factor), mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], resampled.flatten(2).transpose(1, 2)], 1)
