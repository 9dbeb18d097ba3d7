"""Parameter groups and the learning rate as a function of images seen."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from jitscale.config import OptimConfig


def parameter_kind(name: str, dimensions: int) -> str:
    """What a parameter of the network is for: the kinds that may have a learning rate of their own."""
    if name.startswith("x_embedder."):
        return "patch_embedding"
    if name.startswith(("t_embedder.", "y_embedder.", "in_context_posemb")):
        return "embeddings"
    if name.startswith("final_layer.linear."):
        return "output"
    return "matrices" if dimensions >= 2 else "vectors"


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Groups of equal weight decay and learning rate.

    Matrices and convolution kernels decay, vectors (biases, norm weights) do not. A group's `lr_factor` multiplies the
    learning rate of the step.
    """
    factors = {
        "patch_embedding": config.lr_factor_patch_embedding,
        "embeddings": config.lr_factor_embeddings,
        "output": config.lr_factor_output,
        "vectors": config.lr_factor_vectors,
        "matrices": 1.0,
    }
    members: dict[tuple[bool, float], list[nn.Parameter]] = {(True, 1.0): [], (False, 1.0): []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            members.setdefault((p.ndim >= 2, factors[parameter_kind(name, p.ndim)]), []).append(p)
    return [
        {"params": parameters, "weight_decay": config.weight_decay if decays else 0.0, "lr_factor": factor}
        for (decays, factor), parameters in members.items()
        if parameters
    ]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW in its fused form: one pass over memory on GPUs and on CPUs."""
    return torch.optim.AdamW(
        parameter_groups(model, config), lr=config.lr, betas=(config.beta1, config.beta2), fused=True
    )


def learning_rate(config: OptimConfig, images: int, total_images: int) -> float:
    """The rate for the step that ends at `images` images seen: linear warm-up from zero, then the schedule."""
    if images < config.warmup_images:
        return config.lr * images / config.warmup_images
    if config.schedule == "constant":
        return config.lr
    remaining = max(0, total_images - images) / max(1, total_images - config.warmup_images)
    return config.lr * 0.5 * (1.0 - math.cos(math.pi * remaining))
