"""The JiT network: a plain Vision Transformer on pixels (arXiv 2511.13720).

Shapes: B batch, N tokens, C hidden size, P patch size, G = image_size / P tokens a side.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from jitscale.config import DiffusionConfig, ModelConfig
from jitscale.model import layers


class Block(nn.Module):
    """Transformer block whose two branches are shifted, scaled and gated by the condition (adaLN-zero)."""

    def __init__(self, config: ModelConfig, attn_dropout: float, proj_dropout: float) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm1 = layers.RMSNorm(width)
        self.attn = layers.Attention(width, config.num_heads, attn_dropout, proj_dropout)
        self.norm2 = layers.RMSNorm(width)
        self.mlp = layers.SwiGLU(width, proj_dropout)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.kernels: layers.ResidualKernels | None = None  # model/execution.py chooses; None: torch's code

    def forward(self, x: Tensor, condition: Tensor, rope: Tensor) -> Tensor:
        """(B, N, C), (B, C), (2, N, D) -> (B, N, C)"""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, dim=-1)
        if self.kernels is not None:
            dropout = self.attn.proj_drop.p if self.training else 0.0
            branch = self.attn(self.kernels.modulated_norm(x, self.norm1.weight, shift1, scale1), rope)
            x, y = self.kernels.add_and_norm(x, branch, gate1, self.norm2.weight, shift2, scale2, dropout)
            return self.kernels.gated_add(x, self.mlp(y), gate2)
        branch = self.attn(layers.modulate(self.norm1(x), shift1, scale1), rope)
        x = x + gate1[:, None] * self.attn.proj_drop(branch)
        return x + gate2[:, None] * self.mlp(layers.modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """Normalise, modulate and project every token to its P * P * 3 pixels (order: row, column, channel)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm_final = layers.RMSNorm(width)
        self.linear = nn.Linear(width, config.patch_size**2 * 3)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.kernels: layers.ResidualKernels | None = None  # as in a block

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(B, N, C), (B, C) -> (B, N, P * P * 3)"""
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        if self.kernels is not None:
            return self.linear(self.kernels.modulated_norm(x, self.norm_final.weight, shift, scale))
        return self.linear(layers.modulate(self.norm_final(x), shift, scale))


class JiT(nn.Module):
    """net(z, t, y): noisy images, times and labels to what the objective asks for (the clean image by default)."""

    pos_embed: Tensor
    rope: Tensor
    weights_name: str | None = None  # the weight set that `jitscale.load_model` took

    def __init__(self, config: ModelConfig, diffusion: DiffusionConfig | None = None) -> None:
        super().__init__()
        self.config = config
        self.diffusion = diffusion or DiffusionConfig()  # samplers take noise scale and prediction from it
        width = config.hidden_size
        self.x_embedder = layers.BottleneckPatchEmbed(config.patch_size, config.bottleneck_dim, width)
        self.t_embedder = layers.TimestepEmbedder(width)
        self.y_embedder = layers.LabelEmbedder(config.num_classes, width)
        if config.in_context_len > 0:
            self.in_context_posemb = nn.Parameter(torch.empty(1, config.in_context_len, width))
        middle_half = range(config.depth // 4, config.depth // 4 * 3)
        dropouts = (config.attn_dropout, config.proj_dropout)
        self.blocks = nn.ModuleList(
            Block(config, *(dropouts if index in middle_half else (0.0, 0.0))) for index in range(config.depth)
        )
        self.final_layer = FinalLayer(config)
        # Tables are float32 buffers, so that an engine which casts parameters to bf16 leaves them alone.
        for name, table in self.position_tables().items():
            self.register_buffer(name, table, persistent=False)
        self.initialize()

    def position_tables(self) -> dict[str, Tensor]:
        """The buffers by name, computed anew on the default device: `pos_embed` (N, C) and `rope` (2, N, D)."""
        config, grid = self.config, self.config.image_size // self.config.patch_size
        width, span = config.hidden_size, config.position_grid
        return {
            "pos_embed": layers.sincos_position_table(width, grid, span),
            "rope": layers.rope_table(width // config.num_heads, grid, config.in_context_len, span),
        }

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw every weight from torch's default generator (authors' code; arXiv 2511.13720, appendix A)."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.get_parameter("weight"), std=0.02)
        if self.config.in_context_len > 0:
            nn.init.normal_(self.in_context_posemb, std=0.02)
        zeroed = [module.adaLN_modulation[1] for module in (*self.blocks, self.final_layer)]
        for layer in (*zeroed, self.final_layer.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @property
    def null_label(self) -> int:
        """The label index that means "no class"."""
        return self.config.num_classes

    def forward(self, z: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict (B, 3, image_size, image_size) from noisy images `z` of that shape.

        Their times `t` (B,) lie in [0, 1], where 1 is clean; the integer labels `y` (B,) are `null_label` for no class.
        """
        prefix = self.config.in_context_len
        label = self.y_embedder(y)
        condition = self.t_embedder(t) + label  # (B, C)
        x = self.x_embedder(z.to(self.x_embedder.proj1.weight.dtype))
        x = (x + self.pos_embed.to(x.dtype)).contiguous()  # as it is after every block: one graph for all of them
        rope = self.rope[:, prefix:]
        for index, block in enumerate(self.blocks):
            if prefix > 0 and index == self.config.in_context_start:
                x = torch.cat([(label[:, None] + self.in_context_posemb).to(x.dtype), x], dim=1)
                rope = self.rope
            x = block(x, condition, rope)
        x = x[:, prefix:] if prefix > 0 else x
        return self.unpatchify(self.final_layer(x, condition))

    def unpatchify(self, patches: Tensor) -> Tensor:
        """(B, N, P * P * 3) -> (B, 3, G P, G P)"""
        size, patch = self.config.image_size, self.config.patch_size
        grid = size // patch
        images = patches.view(-1, grid, grid, patch, patch, 3)
        return images.permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, size, size)


def network_holding(weights: Mapping[str, Tensor], config: ModelConfig, diffusion: DiffusionConfig) -> JiT:
    """The network whose parameters are `weights` (name -> tensor) themselves, on their device; in eval mode.

    No weight is drawn, and none is copied. Raises a RuntimeError if names or shapes are not those of the network.
    """
    with torch.device("meta"):
        network = JiT(config, diffusion)
    network.load_state_dict(dict(weights), assign=True)
    device = next(iter(weights.values())).device
    # Computed on the CPU, as in every other network: the sines of a GPU differ in the last bit.
    for name, table in network.position_tables().items():
        network.register_buffer(name, table.to(device), persistent=False)
    return network.eval()


def parameter_kind(name: str, dimensions: int) -> str:
    """What a parameter of the network is for: the kinds that may have a learning rate of their own."""
    if name.startswith("x_embedder."):
        return "patch_embedding"
    if name.startswith(("t_embedder.", "y_embedder.", "in_context_posemb")):
        return "embeddings"
    if name.startswith("final_layer.linear."):
        return "output"
    return "matrices" if dimensions >= 2 else "vectors"
