"""JiT's parameters with the names of diffusers' open pull request, in a class that the real diffusers loads and saves.

The source is the pull request's table of names (head of 2026-06-28), not our own map. The class computes nothing.
"""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn


class _Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.norm_q, self.norm_k = _Norm(width // heads), _Norm(width // heads)
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.0)])


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = _Norm(width), _Norm(width)
        self.attn = _Attention(width, heads)
        self.mlp = nn.ModuleDict({"w12": nn.Linear(width, 2 * inner), "w3": nn.Linear(inner, width)})
        self.adaLN_modulation = nn.Linear(width, 6 * width)


class JiTTransformer2DModel(ModelMixin, ConfigMixin):
    """config.json names the class, so it needs this name. Its arguments are the keys of transformer/config.json."""

    @register_to_config
    def __init__(
        self,
        sample_size: int = 256,
        patch_size: int = 16,
        in_channels: int = 3,
        hidden_size: int = 768,
        num_layers: int = 12,
        num_attention_heads: int = 12,
        mlp_ratio: float = 4.0,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
        num_classes: int = 1000,
        bottleneck_dim: int = 128,
        in_context_len: int = 32,
        in_context_start: int = 4,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        width, pixels = hidden_size, patch_size * patch_size * in_channels
        inner = int(int(mlp_ratio * width) * 2 / 3)
        self.x_embedder = nn.ModuleDict(
            {
                "proj1": nn.Conv2d(in_channels, bottleneck_dim, patch_size, patch_size, bias=False),
                "proj2": nn.Conv2d(bottleneck_dim, width, 1),
            }
        )
        self.t_embedder = nn.ModuleDict(
            {"mlp": nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))}
        )
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(num_classes + 1, width)})
        self.register_buffer("pos_embed", torch.empty(1, (sample_size // patch_size) ** 2, width))
        if in_context_len > 0:
            self.in_context_posemb = nn.Parameter(torch.empty(1, in_context_len, width))
        self.blocks = nn.ModuleList([_Block(width, num_attention_heads, inner) for _ in range(num_layers)])
        self.norm_final = _Norm(width)
        self.linear_final = nn.Linear(width, pixels)
        self.adaLN_modulation_final = nn.Linear(width, 2 * width)
