"""The JiT network: a plain Vision Transformer on pixels (arXiv 2511.13720).

Shapes: B batch, N tokens, K of them kept in routed blocks, C hidden size, A channels of an image, P patch size,
D = P * P * A numbers of a patch, R rank of a subspace, G = image_size / P tokens per side.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from jitscale.config import (
    DiffusionConfig,
    ModelConfig,
    has_fitted_subspace,
    image_shape,
    patch_elements,
    routed_blocks,
)
from jitscale.model import layers


class Block(nn.Module):
    """Transformer block; the condition shifts, scales and gates its two branches (adaLN-zero)."""

    def __init__(self, config: ModelConfig, attn_dropout: float, proj_dropout: float) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm1 = layers.RMSNorm(width)
        self.attn = layers.Attention(width, config.num_heads, attn_dropout, proj_dropout)
        self.norm2 = layers.RMSNorm(width)
        self.mlp = layers.SwiGLU(width, proj_dropout)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.kernels: layers.ResidualKernels | None = None  # set by model/execution.py; None: torch's code

    def forward(self, x: Tensor, condition: Tensor, rope: Tensor) -> Tensor:
        """(B, N, C), (B, C), and `rope` as `Attention` takes it -> (B, N, C)"""
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
    """Normalise, modulate and project every token to the D numbers of its patch (order: row, column, channel)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm_final = layers.RMSNorm(width)
        self.linear = nn.Linear(width, patch_elements(config))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.kernels: layers.ResidualKernels | None = None  # as in a block

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(B, N, C), (B, C) -> (B, N, D)"""
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        if self.kernels is not None:
            return self.linear(self.kernels.modulated_norm(x, self.norm_final.weight, shift, scale))
        return self.linear(layers.modulate(self.norm_final(x), shift, scale))


class JiT(nn.Module):
    """net(z, t, y): noisy images, times and labels -> the objective's prediction (the clean image by default)."""

    pos_embed: Tensor
    rope: Tensor
    # (D, R) with orthonormal columns, for prediction asym: v is predicted in this subspace, x outside of it. It is not
    # trained; NaN until it is given or loaded. None for other predictions.
    subspace: Tensor | None
    weights_name: str | None = None  # the weight set that `jitscale.load_model` loaded

    def __init__(
        self, config: ModelConfig, diffusion: DiffusionConfig | None = None, subspace: Tensor | None = None
    ) -> None:
        """Draw random weights; `subspace` (D, R) is for asym."""
        super().__init__()
        self.config = config
        self.diffusion = diffusion or DiffusionConfig()  # samplers take noise scale and prediction from it
        width = config.hidden_size
        patch = (config.in_channels, config.patch_size)
        self.x_embedder = layers.BottleneckPatchEmbed(*patch, config.bottleneck_dim, width)
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
        if config.middle_head > 0:
            # A layer draws weights when it is made. The fork keeps the other layers' weights independent of this one.
            with torch.random.fork_rng(devices=()):
                self.middle_layer = FinalLayer(config)
        # Tables are float32 buffers, because an engine may cast parameters to bf16.
        self.register_buffer("subspace", self._own_subspace(), persistent=True)
        for name, table in self.fixed_tables().items():
            self.register_buffer(name, table, persistent=False)
        if subspace is not None and self.subspace is not None:
            self.subspace.copy_(subspace)
        self.initialize()

    def fixed_tables(self) -> dict[str, Tensor]:
        """Buffers that the settings determine, by name, computed on the default device.

        They are `pos_embed` (N, C) and `rope` (2, N, head dim); for asym of rank 0 or full rank also the `subspace`.
        """
        config, grid = self.config, self.config.image_size // self.config.patch_size
        width, span = config.hidden_size, config.position_grid
        tables = {
            "pos_embed": layers.sincos_position_table(width, grid, span),
            "rope": layers.rope_table(width // config.num_heads, grid, config.in_context_len, span),
        }
        if self.diffusion.prediction == "asym" and not has_fitted_subspace(config, self.diffusion):
            tables["subspace"] = torch.eye(patch_elements(config))[:, : self.diffusion.rank]
        return tables

    def _own_subspace(self) -> Tensor | None:
        """A buffer of NaN for a fitted subspace; None if the rank determines the subspace, or there is none."""
        if not has_fitted_subspace(self.config, self.diffusion):
            return None
        return torch.full((patch_elements(self.config), self.diffusion.rank), torch.nan)

    def stored_buffers(self) -> dict[str, Tensor]:
        """Buffers that belong to the weights, by name: a fitted subspace."""
        if self.subspace is None or not has_fitted_subspace(self.config, self.diffusion):
            return {}
        return {"subspace": self.subspace}

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw every weight from torch's default generator (authors' code; arXiv 2511.13720, appendix A).

        For asym, the first rows of the patch embedding project on the subspace (arXiv 2605.12964).
        """
        heads = [self.final_layer, *([self.middle_layer] if self.config.middle_head > 0 else [])]
        # The middle output layer is zero. Nothing is drawn for it, so that it does not change the other weights.
        undrawn = {id(module) for head in heads[1:] for module in head.modules()}
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)) and id(module) not in undrawn:
                nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.get_parameter("weight"), std=0.02)
        if self.config.in_context_len > 0:
            nn.init.normal_(self.in_context_posemb, std=0.02)
        zeroed = [module.adaLN_modulation[1] for module in (*self.blocks, *heads)]
        for layer in (*zeroed, *(head.linear for head in heads)):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        if self.subspace is not None and self.subspace.shape[1] < len(self.subspace):
            weight = self.x_embedder.proj1.weight  # (bottleneck, A, P, P)
            numbers, rows = len(self.subspace), min(self.subspace.shape[1], len(weight))
            scale = (2 * numbers / (numbers + len(weight))) ** 0.5
            patches = self.subspace.T[:rows].unflatten(1, (self.config.patch_size, self.config.patch_size, -1))
            weight[:rows] = scale * patches.permute(0, 3, 1, 2)

    @property
    def null_label(self) -> int:
        """The label index that means "no class"."""
        return self.config.num_classes

    def forward(self, z: Tensor, t: Tensor, y: Tensor, kept: Tensor | None = None, *, middle: bool = False) -> Tensor:
        """Predict (B, A, image_size, image_size) from noisy images `z` of that shape.

        Times `t` (B,) are in [0, 1]; 1 is clean. Labels `y` (B,) are integers; `null_label` means no class.

        If `kept` (B, K) is given, only these tokens of each image pass through all blocks. The others skip the routed
        blocks (`model.route_blocks`; TREAD, arXiv 2501.04765).

        With `middle`, the result is (2, B, A, image_size, image_size): the second prediction is that of the middle
        output layer, zero for tokens that this layer has not seen.

        Raises a ValueError if `middle` is set and the network has no such layer, or if `kept` is given and the network
        routes no tokens.
        """
        config, prefix = self.config, self.config.in_context_len
        if middle and config.middle_head == 0:
            raise ValueError("middle: this network has no middle output layer (model.middle_head=0)")
        route = routed_blocks(config) if kept is not None else range(0)
        if kept is not None and not route:
            raise ValueError("kept: this network routes no tokens (model.route_share=0)")
        label = self.y_embedder(y)
        condition = self.t_embedder(t) + label  # (B, C)
        x = self.x_embedder(z.to(self.x_embedder.proj1.weight.dtype))
        x = (x + self.pos_embed.to(x.dtype)).contiguous()  # the layout that blocks return, so that all share a graph
        rope, seen, tokens_of_class = self.rope[:, prefix:], None, 0
        aside, middle_patches = x, x
        for index, block in enumerate(self.blocks):
            if kept is not None and index == route.start:
                aside = x[:, tokens_of_class:]
                x = torch.cat([x[:, :tokens_of_class], _taken(aside, kept)], dim=1).contiguous()
                rope, seen = self._rope_of(kept, tokens_of_class), kept
            if prefix > 0 and index == config.in_context_start:
                x = torch.cat([(label[:, None] + self.in_context_posemb).to(x.dtype), x], dim=1)
                tokens_of_class = prefix
                rope = self.rope if seen is None else self._rope_of(seen, prefix)
            x = block(x, condition, rope)
            if middle and index == config.middle_head - 1:
                middle_patches = self.middle_layer(x[:, tokens_of_class:], condition)
                if seen is not None:
                    unseen = middle_patches.new_zeros(len(x), len(self.pos_embed), middle_patches.shape[2])
                    middle_patches = _put(unseen, seen, middle_patches)
            if kept is not None and index == route.stop - 1:
                whole = _put(aside, kept, x[:, tokens_of_class:])
                x = torch.cat([x[:, :tokens_of_class], whole], dim=1)
                rope, seen = self.rope[:, prefix - tokens_of_class :], None
        prediction = self.unpatchify(self.final_layer(x[:, tokens_of_class:], condition))
        return torch.stack([prediction, self.unpatchify(middle_patches)]) if middle else prediction

    def _rope_of(self, kept: Tensor, prefix: int) -> Tensor:
        """The rotations of `prefix` class tokens and of the `kept` (B, K) tokens: (2, B, prefix + K, head dim)."""
        tables = self.rope[:, self.config.in_context_len :][:, kept]
        classes = self.rope[:, None, :prefix].expand(-1, len(kept), -1, -1)
        return torch.cat([classes, tables], dim=2)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """(B, N, D) -> (B, A, G P, G P)"""
        shape, patch = image_shape(self.config), self.config.patch_size
        grid = self.config.image_size // patch
        images = patches.view(-1, grid, grid, patch, patch, self.config.in_channels)
        return images.permute(0, 5, 1, 3, 2, 4).reshape(-1, *shape)


def _taken(x: Tensor, tokens: Tensor) -> Tensor:
    """The `tokens` (B, K) of x (B, N, C): (B, K, C)."""
    return x.gather(1, tokens[:, :, None].expand(-1, -1, x.shape[2]))


def _put(x: Tensor, tokens: Tensor, values: Tensor) -> Tensor:
    """x (B, N, C) with `values` (B, K, C) in place of its `tokens` (B, K)."""
    return x.scatter(1, tokens[:, :, None].expand(-1, -1, x.shape[2]), values)


def network_holding(weights: Mapping[str, Tensor], config: ModelConfig, diffusion: DiffusionConfig) -> JiT:
    """A network in eval mode whose parameters and stored buffers are `weights` themselves, by name, on their device.

    No weight is drawn or copied. Raises a RuntimeError if names or shapes do not match the network.
    """
    with torch.device("meta"):
        network = JiT(config, diffusion)
    network.load_state_dict(dict(weights), assign=True)
    device = next(iter(weights.values())).device
    # Computed on the CPU, as in `JiT.__init__`: the sines of a GPU differ in the last bit.
    for name, table in network.fixed_tables().items():
        network.register_buffer(name, table.to(device), persistent=False)
    return network.eval()


def parameter_kind(name: str, dimensions: int) -> str:
    """The kind of a parameter; each kind may have its own factor of the learning rate."""
    if name.startswith("x_embedder."):
        return "patch_embedding"
    if name.startswith(("t_embedder.", "y_embedder.", "in_context_posemb")):
        return "embeddings"
    if name.startswith(("final_layer.linear.", "middle_layer.linear.")):
        return "output"
    return "matrices" if dimensions >= 2 else "vectors"
