"""The upgraded network is the old one seen through pooling."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import jitscale
from jitscale.config import Config, ModelConfig
from jitscale.errors import ConfigError
from jitscale.model.jit import JiT
from jitscale.upgrade import upgrade_factor, upgrade_tensor

OLD = ModelConfig(
    image_size=16,
    patch_size=4,
    hidden_size=32,
    depth=2,
    num_heads=2,
    bottleneck_dim=8,
    in_context_len=4,
    in_context_start=1,
    num_classes=10,
)


def low_and_high(factor: int) -> tuple[JiT, JiT]:
    torch.manual_seed(0)
    low = JiT(OLD).eval()
    with torch.no_grad():
        for parameter in low.parameters():  # zero-initialised layers would hide an error
            parameter.add_(0.05 * torch.randn_like(parameter))
    config = ModelConfig(**{**vars(OLD), "image_size": 16 * factor, "patch_size": 4 * factor})
    high = JiT(config).eval()
    high.diffusion.noise_scale = float(factor)
    high.load_state_dict({name: upgrade_tensor(name, p, factor) for name, p in low.state_dict().items()})
    return low, high


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_the_function_is_preserved(factor: int) -> None:
    low, high = low_and_high(factor)
    z, t, y = torch.randn(3, 3, 16 * factor, 16 * factor), torch.rand(3), torch.tensor([0, 5, 10])
    with torch.no_grad():
        expected = low(F.avg_pool2d(z, factor), t, y)
        found = F.avg_pool2d(high(z, t, y), factor)
    assert expected.std() > 0.05
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_whole_trajectories_are_preserved(method: str) -> None:
    """avgpool(sample_hi(z)) == sample_lo(avgpool(z)); noise of scale 2 pools to standard deviation 1."""
    low, high = low_and_high(2)
    noise = torch.randn(2, 3, 32, 32)
    settings = {"method": method, "steps": 10, "guidance_scale": 2.0}
    found = F.avg_pool2d(jitscale.sample(high, [1, 2], noise=noise, **settings), 2)
    pooled = F.avg_pool2d(2.0 * noise, 2)
    expected = jitscale.sample(low, [1, 2], noise=pooled, noise_scale=1.0, **settings)
    assert pooled.std() == pytest.approx(1.0, abs=0.1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_it_commutes_with_averaging() -> None:
    weight, other = torch.randn(8, 3, 4, 4), torch.randn(8, 3, 4, 4)
    name = "x_embedder.proj1.weight"
    averaged = upgrade_tensor(name, weight.lerp(other, 0.25), 2)
    torch.testing.assert_close(averaged, upgrade_tensor(name, weight, 2).lerp(upgrade_tensor(name, other, 2), 0.25))


def test_what_sees_no_patch_is_kept() -> None:
    low, high = low_and_high(2)
    resized = {name for name, p in low.state_dict().items() if p.shape != high.state_dict()[name].shape}
    assert resized == {"x_embedder.proj1.weight", "final_layer.linear.weight", "final_layer.linear.bias"}
    for name, p in low.state_dict().items():
        assert name in resized or torch.equal(p, high.state_dict()[name])


def config(noise_scale: float, **changes: int) -> Config:
    made = Config(model=ModelConfig(**{**vars(OLD), **changes}))
    made.diffusion.noise_scale = noise_scale
    return made


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (config(2.0, image_size=32, patch_size=8, depth=3, num_classes=5), r"depth: 2 -> 3; .*num_classes: 10 -> 5"),
        (config(2.0, image_size=24, patch_size=6), "must be a multiple of the old patch size 4"),
        (config(2.0, image_size=64, patch_size=8), "model.image_size=64 must be 2 x 16"),
        (config(1.0, image_size=32, patch_size=8), r"must be 2 x the old one.*add diffusion.noise_scale=2.0"),
    ],
)
def test_refusals(target: Config, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        upgrade_factor(config(1.0), target)
    assert upgrade_factor(config(1.0), config(2.0, image_size=32, patch_size=8)) == 2
