"""The stages of a run through rising resolutions, and which are refused."""

from pathlib import Path

import pytest

from jitscale.checkpoints.upgrade import plan_upgrade
from jitscale.config import Config, load_config
from jitscale.errors import ConfigError
from jitscale.progressive import run_dirs, stages_of
from tests.support import ROOT


def configured(*overrides: str) -> Config:
    return load_config(ROOT / "configs/jit_b_256.yaml", ["run.dir=runs/p", *overrides])


def test_stages_differ_by_what_an_upgrade_changes() -> None:
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


def test_folders_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "at_64px").mkdir()
    assert run_dirs(tmp_path) == [tmp_path, tmp_path / "at_64px"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["progressive.resolutions=[128,64]", "progressive.images=[1,1]"], r"must rise.*for example \[64,128\]"),
        (
            ["progressive.resolutions=[256]", "progressive.images=[1]"],
            r"must rise, and end below model\.image_size=256",
        ),
        (["progressive.resolutions=[100]", "progressive.images=[1]"], "patches of 6.25 pixels.*give multiples of 16"),
        (["progressive.resolutions=[64,128]", "progressive.images=[5]"], "for each of the 2 lower resolutions"),
        (["progressive.resolutions=[64]", "progressive.images=[0]"], r"images=0 must be at least 1"),
        (
            ["progressive.resolutions=[64]", "progressive.images=[1]", "model.position_grid=8"],
            r"set model\.position_grid=null",
        ),
    ],
)
def test_impossible_stages_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configured(*overrides)
