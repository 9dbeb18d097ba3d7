"""Parameter groups and the learning rate as a function of images seen."""

from __future__ import annotations

import math

import torch
from torch import nn

from jitscale.config import OptimConfig


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, object]]:
    """Matrices and convolution kernels decay, vectors (biases, norm weights) do not."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for _, p in named if p.ndim >= 2]
    kept = [p for _, p in named if p.ndim < 2]
    return [
        {"params": decayed, "weight_decay": config.weight_decay, "name": "matrices"},
        {"params": kept, "weight_decay": 0.0, "name": "vectors"},
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
