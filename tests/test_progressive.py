"""The stages of a run through rising resolutions, and stages that are refused."""

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from jitscale import train as training
from jitscale.checkpoints.upgrade import plan_upgrade
from jitscale.config import Config, load_config
from jitscale.errors import ConfigError, ExitCode, UserError
from jitscale.parallel import World
from jitscale.progressive import run_dirs, stages_of
from jitscale.run_folder import Claim, claim
from tests.support import ROOT


def configured(*overrides: str) -> Config:
    return load_config(ROOT / "configs/jit_b_256.yaml", ["run.dir=runs/p", *overrides])


def test_stages_differ_only_in_settings_that_an_upgrade_changes() -> None:
    config = configured("progressive.resolutions=[64,128]", "progressive.images=[1000,2000]", "run.max_images=3000")
    low, middle, high = stages_of(config)
    assert [(s.model.image_size, s.model.patch_size, s.diffusion.noise_scale) for s in (low, middle, high)] == [
        (64, 4, 0.25),
        (128, 8, 0.5),
        (256, 16, 1.0),
    ]
    assert [(s.run.dir, s.run.max_images) for s in (low, middle, high)] == [
        ("runs/p/at_64px", 1000),
        ("runs/p/at_128px", 2000),
        ("runs/p", 3000),
    ]
    assert plan_upgrade(low, middle).ratio == plan_upgrade(middle, high).ratio == 2
    assert [s.optim.lr_factor_patch_embedding for s in (low, middle, high)] == [1.0, 1 / 4, 1 / 16]
    assert low.optim == config.optim
    assert stages_of(configured()) == [configured()]


def test_stages_of_asym_with_a_middle_layer() -> None:
    progressive = ["progressive.resolutions=[64,128]", "progressive.images=[1000,2000]", "run.max_images=3000"]
    asym = ["diffusion.prediction=asym", "model.middle_head=4"]
    for rank, ranks in ((0, [0, 0, 0]), (8, [8, 8, 8]), (768, [48, 192, 768])):
        low, middle, high = stages_of(configured(*progressive, *asym, f"diffusion.rank={rank}"))
        assert [stage.diffusion.rank for stage in (low, middle, high)] == ranks
        assert [stage.model.middle_head for stage in (low, middle, high)] == [4, 4, 4]
        assert plan_upgrade(low, middle).ratio == plan_upgrade(middle, high).ratio == 2


def test_the_folders_of_a_progressive_run(tmp_path: Path) -> None:
    (tmp_path / "at_64px").mkdir()
    assert run_dirs(tmp_path) == [tmp_path, tmp_path / "at_64px"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["progressive.resolutions=[128,64]", "progressive.images=[1,1]"], r"must rise.*for example \[64,128\]"),
        (
            ["progressive.resolutions=[256]", "progressive.images=[1]"],
            r"must rise, and stay below model\.image_size=256",
        ),
        (["progressive.resolutions=[100]", "progressive.images=[1]"], "patches of 6.25 pixels.*give multiples of 16"),
        (["progressive.resolutions=[64,128]", "progressive.images=[5]"], "for each of the 2 lower resolutions"),
        (["progressive.resolutions=[64]", "progressive.images=[0]"], r"images=0 must be at least 1"),
        (
            [
                "progressive.resolutions=[32]",
                "progressive.images=[1]",
                "diffusion.prediction=asym",
                "diffusion.rank=12",
            ],
            r"patches of 12 numbers, and diffusion\.rank=12.*begin at a higher resolution",
        ),
        (
            [
                *("progressive.resolutions=[32]", "progressive.images=[1]", "model.in_channels=1"),
                *("diffusion.prediction=asym", "diffusion.rank=4"),
            ],
            r"patches of 4 numbers, and diffusion\.rank=4",
        ),
        (
            ["progressive.resolutions=[64,96]", "progressive.images=[1,1]", "diffusion.prediction=asym"],
            r"must grow by whole factors.*for example \[64,128\]",
        ),
        (
            ["progressive.resolutions=[64]", "progressive.images=[1]", "model.position_grid=8"],
            r"set model\.position_grid=null",
        ),
    ],
)
def test_impossible_stages_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configured(*overrides)


def test_the_lock_of_a_run_holds_through_all_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ["progressive.resolutions=[64,128]", "progressive.images=[1000,2000]", "run.max_images=3000"]
    stages = stages_of(configured(*settings, f"run.dir={tmp_path}"))
    trained = []

    def train(stage: Config, world: World, claimed: Claim | None) -> int:
        trained.append((stage.model.image_size, claimed is not None))
        with ExitStack() as other, pytest.raises(UserError, match="is at work there"):
            claim(tmp_path, other)
        return ExitCode.DONE

    monkeypatch.setattr(training, "train", train)
    monkeypatch.setattr(training, "open_once_a_node", lambda config, world: None)
    monkeypatch.setattr(training, "_upgrade", lambda low, high: None)
    with ExitStack() as held:
        code = training._train_through(stages, World(0, 1, 0, torch.device("cpu")), held)
    assert code == ExitCode.DONE
    assert trained == [(64, False), (128, False), (256, True)]
    with ExitStack() as held:
        claim(tmp_path, held)
