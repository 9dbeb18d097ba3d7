"""Safetensors files that are written in pieces."""

import os
from pathlib import Path

import pytest
import torch

import jitscale
from jitscale.checkpoints.streams import atomic_safetensors
from jitscale.checkpoints.weights import description
from jitscale.config import Config, ModelConfig
from jitscale.model.jit import JiT


def test_pieces_of_any_size_make_a_readable_file(tmp_path: Path) -> None:
    """The model's reader and the metadata reader accept the file. If writing fails, no file is left."""
    config = Config(
        model=ModelConfig(image_size=8, patch_size=4, hidden_size=16, depth=1, num_heads=2, in_context_start=0)
    )
    config.diffusion.noise_scale = 2.0
    torch.manual_seed(0)
    tensors = {name: p.detach().clone() for name, p in JiT(config.model).named_parameters()}
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    metadata = {**description("power_0.100", config), "more": "1"}
    with atomic_safetensors(tmp_path / "pieces.safetensors", shapes, metadata) as append:
        for values in torch.cat([t.flatten() for t in tensors.values()]).split(1000):
            append(values)
    found = jitscale.load_model(tmp_path / "pieces.safetensors")
    assert found.config == config.model
    assert found.diffusion.noise_scale == 2.0
    assert all(torch.equal(p, tensors[name]) for name, p in found.named_parameters())

    def fail() -> None:
        with atomic_safetensors(tmp_path / "failed.safetensors", shapes) as append:
            append(torch.zeros(10))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert os.listdir(tmp_path) == ["pieces.safetensors"]
