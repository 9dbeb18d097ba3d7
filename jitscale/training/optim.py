"""Parameter groups and the learning rate as a function of images seen."""

import math
from typing import Any

import torch
from torch import nn

from jitscale.config import OptimConfig
from jitscale.model.jit import parameter_kind
from jitscale.training.muon import Muon

ALIGNED_ELEMENTS = 8  # 16 bytes of bf16


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Groups of parameters with the same weight decay and learning rate.

    Weight decay acts on matrices and convolution kernels, not on vectors (biases, norm weights). A group's `lr_factor`
    multiplies the learning rate of the step. If its `muon` is true, Muon updates its matrices.
    """
    factors = {
        "patch_embedding": config.lr_factor_patch_embedding,
        "embeddings": config.lr_factor_embeddings,
        "output": config.lr_factor_output,
        "vectors": config.lr_factor_vectors,
        "matrices": 1.0,
    }
    members: dict[tuple[bool, float, bool], list[nn.Parameter]] = {(True, 1.0, False): [], (False, 1.0, False): []}
    # ZeRO concatenates a group's parameters. GPU kernels assume that a parameter starts at a multiple of 16 bytes, so
    # parameters of odd sizes come last.
    for name, p in sorted(model.named_parameters(), key=lambda named: named[1].numel() % ALIGNED_ELEMENTS != 0):
        if p.requires_grad:
            kind = parameter_kind(name, p.ndim)
            muon = config.name == "muon" and kind == "matrices"
            members.setdefault((p.ndim >= 2, factors[kind], muon), []).append(p)
    return [
        {"params": found, "weight_decay": config.weight_decay if decays else 0.0, "lr_factor": factor, "muon": muon}
        for (decays, factor, muon), found in members.items()
        if found
    ]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW in its fused form (one pass over memory, on GPUs and CPUs), or Muon, which uses AdamW for some groups."""
    groups = parameter_groups(model, config)
    adamw: dict[str, Any] = {"lr": config.lr, "betas": (config.beta1, config.beta2), "fused": True}
    if config.name == "muon":
        return Muon(groups, momentum=config.muon_momentum, **adamw)
    return torch.optim.AdamW(groups, **adamw)


def learning_rate(config: OptimConfig, images: int, total_images: int) -> float:
    """The rate of the step after which `images` images are seen: linear warm-up from zero, then the schedule."""
    if images < config.warmup_images:
        return config.lr * images / config.warmup_images
    if config.schedule == "constant":
        return config.lr
    remaining = max(0, total_images - images) / max(1, total_images - config.warmup_images)
    return config.lr * 0.5 * (1.0 - math.cos(math.pi * remaining))
