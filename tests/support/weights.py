"""Weights of tiny networks on disk, and functions to compare and convert them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from jitscale.checkpoints.format import Progress, step_folder
from jitscale.checkpoints.saving import write_streamed
from jitscale.checkpoints.weights import StoredWeights, shapes_of
from jitscale.config import Config, DiffusionConfig, EmaConfig, EvaluationConfig, ModelConfig, RunConfig
from tests.support.tiny import MODEL
from tools.convert_checkpoint import main

STEPS, SETS = 7, ("model", "ema_0.9")


def settings(model: ModelConfig = MODEL, diffusion: DiffusionConfig | None = None, **model_fields: object) -> Config:
    """The configuration of a run whose samples take two steps."""
    return Config(
        model=replace(model, **model_fields),  # type: ignore[arg-type]
        diffusion=diffusion or DiffusionConfig(noise_scale=2.0, t_eps=0.04, mu=-0.4, sigma=0.9),
        ema=EmaConfig(decays=[0.9]),
        evaluation=EvaluationConfig(weights="ema_0.9", steps=2, method="euler"),
        run=RunConfig(max_steps=9),
    )


def run_of(folder: Path, config: Config, sets: Sequence[str] = SETS, scale: float = 0.1) -> Path:
    """Write a run to `folder` with one checkpoint of small random weights."""
    torch.manual_seed(0)
    shapes, progress = shapes_of(config), Progress(STEPS, 8 * STEPS, STEPS, None)
    write_streamed(
        step_folder(folder, STEPS), progress, config, shapes, sets, lambda _, key: scale * torch.randn(shapes[key])
    )
    return folder


def convert(source: Path | str, to: str, output: Path, *more: object) -> Path:
    """Write `output` with tools/convert_checkpoint.py."""
    arguments = ["--checkpoint", source, "--to", to, "--output", output, *more]
    assert main([str(argument) for argument in arguments]) == 0
    return output


def assert_same(found: StoredWeights, expected: StoredWeights, found_set: str, expected_set: str) -> None:
    """Each tensor is bit-equal, and so are the shapes and the diffusion settings."""
    assert found.shapes == expected.shapes
    assert found.config.diffusion == expected.config.diffusion
    for name in expected.shapes:
        assert torch.equal(found.tensor(found_set, name), expected.tensor(expected_set, name)), name
