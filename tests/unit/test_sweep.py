"""What a sweep names, and that sharing the steps before guidance changes nothing and saves what it should."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jitscale.config import Config, DiffusionConfig, ModelConfig, load_config
from jitscale.diffusion.sampler import Sampler
from jitscale.errors import UserError
from jitscale.evaluation.generate import generate, generate_by_scale
from jitscale.evaluation.sweep import Setting, settings_of
from jitscale.model.jit import JiT

SETS = ["model", "ema_0.9"]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    path = tmp_path / "config.yaml"
    path.write_text("ema: {decays: [0.9]}\nevaluation: {weights: ema_0.9}\nrun: {max_steps: 1}\n")
    return load_config(path)


def test_combinations(config: Config) -> None:
    found = settings_of(["guidance=1.0:2.0:0.5", "ema=all", "interval=0.1:1.0,0.2:0.8"], config, SETS)
    own = [
        (scale, interval)
        for interval in ((0.1, 1.0), (0.2, 0.8))
        for scale in (1.0, 1.5, 2.0)
        if (scale, interval) != (1.0, (0.2, 0.8))
    ]
    assert found == [Setting(name, interval, scale) for name in SETS for scale, interval in own]
    assert settings_of([], config, SETS) == [Setting("ema_0.9", (0.1, 1.0), 1.0)]
    assert [s.scale for s in settings_of(["guidance=1,3,1"], config, SETS)] == [1.0, 3.0]


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        ("cfg=1", "write one of guidance="),
        ("guidance=1:2", "write FROM:TO:STEP"),
        ("guidance=1:2:0", "write FROM:TO:STEP"),
        ("guidance=1:1000:1", "200 at most"),
        ("guidance=nan", "write FROM:TO:STEP"),
        ("ema=ema_0.5", "there are model, ema_0.9"),
        ("interval=0.5:0.1", "0 <= low < high <= 1"),
    ],
)
def test_mistakes(config: Config, axis: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings_of([axis], config, SETS)


def test_nothing_guides_a_network_without_labels(config: Config) -> None:
    config.model.num_classes = 0
    with pytest.raises(UserError, match="nothing guides it"):
        settings_of(["guidance=2"], config, SETS)


@pytest.mark.parametrize(
    ("method", "interval", "before"),
    [("heun", (0.35, 0.8), 3), ("euler", (0.35, 0.8), 4), ("heun", (0.0, 1.0), 0), ("heun", (0.95, 1.0), 10)],
)
def test_shared_steps_change_no_image(method: str, interval: tuple[float, float], before: int) -> None:
    torch.manual_seed(0)
    model = JiT(ModelConfig(16, 4, 32, 2, 2, 8, 4, 1, 10), DiffusionConfig()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    first = Sampler(method, 10, 1.5, interval)
    samplers = [replace(first, guidance_scale=scale) for scale in (1.0, 1.5, 3.0)]
    assert first.steps_before_guidance() == before
    alone = [generate(model, sampler, range(4), seed=7) for sampler in samplers]
    separately = sum(seen)
    seen.clear()
    together = list(generate_by_scale(model, samplers, range(4), seed=7))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    shared = 2 * before - (before == 10) if method == "heun" else before
    assert separately - sum(seen) == 2 * 4 * shared, "the steps before, of two of three scales"
