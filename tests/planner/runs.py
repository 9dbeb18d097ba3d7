"""Configurations of runs to plan."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jitscale.config import Config, EmaConfig, EngineConfig, ModelConfig, load_config
from tests.support import ROOT
from tests.support.tiny import MODEL

TINY = replace(
    MODEL,
    image_size=64,
    patch_size=8,
    hidden_size=96,
    depth=4,
    num_heads=3,
    bottleneck_dim=24,
    in_context_len=8,
)


def planned(model: ModelConfig, decays: int = 0, **engine: Any) -> Config:
    """The configuration of a run with `decays` averages."""
    averages = EmaConfig(decays=[1 - 0.1 / (index + 1) for index in range(decays)])
    return Config(model=model, engine=EngineConfig(**engine), ema=averages)


def shipped(name: str, *overrides: str) -> Config:
    return load_config(ROOT / "configs" / f"jit_{name}.yaml", overrides)
