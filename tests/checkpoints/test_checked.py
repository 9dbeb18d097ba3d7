"""A tool reopens its output before it gives it its final name. It refuses broken output and leaves nothing behind."""

import argparse
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from jitscale.checkpoints import upgrade
from jitscale.checkpoints.checked import checked_output
from jitscale.checkpoints.format import Checkpoint
from jitscale.checkpoints.opening import open_weights
from jitscale.checkpoints.power_averages import Reconstruction
from jitscale.checkpoints.weights import StoredWeights, description, write_safetensors
from jitscale.config import Config, load_config
from jitscale.errors import CheckpointError, UserError
from tests.support.weights import SETS, run_of, settings
from tools import posthoc_ema
from tools.convert_checkpoint import FORMS, main

BROKEN = "blocks.1.mlp.w3.bias"
NOT_FINITE = f"{BROKEN} of the set .* holds values that are not finite"


class BreaksLater(StoredWeights):
    """Weights that are finite the first time a tensor is read, and NaN at every later read."""

    def __init__(self, stored: StoredWeights) -> None:
        self.path, self.config, self.shapes = stored.path, stored.config, stored.shapes
        self.weight_sets, self.default = stored.weight_sets, stored.default
        self._stored, self._seen = stored, set[str]()

    def tensor(self, set_name: str, parameter: str) -> torch.Tensor:
        found = self._stored.tensor(set_name, parameter)
        if parameter != BROKEN or set_name not in self._seen:
            self._seen |= {set_name} if parameter == BROKEN else set()
            return found
        return found * torch.nan


@pytest.mark.parametrize("form", FORMS)
def test_no_form_keeps_an_output_that_is_not_finite(form: str, tmp_path: Path) -> None:
    """The source is finite at the first check, but the written tensors are not."""
    stored = BreaksLater(open_weights(run_of(tmp_path / "run", settings())))
    (config := tmp_path / "config.yaml").write_bytes(
        (tmp_path / "run/checkpoints/step_00000007/config.yaml").read_bytes()
    )
    options = argparse.Namespace(
        output=tmp_path / "out", config=config, weights=None, samples=0, license=None, max_shard_bytes=10**9
    )
    vars(options).update(ema1="ema_0.9", ema2="ema_0.9", epoch=0, images=0)
    before = sorted(tmp_path.iterdir())
    conversion = FORMS[form](stored, options)
    with (
        pytest.raises(CheckpointError, match=NOT_FINITE) as error,
        checked_output(options.output, conversion.config, conversion.sets) as staged,
    ):
        conversion.write(staged)
    assert str(error.value).startswith(f"{options.output}"), (
        "the message names the requested output, not the staging folder"
    )
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("form", FORMS)
def test_a_full_disk_is_a_one_line_error(form: str, tmp_path: Path) -> None:
    """This also holds for libraries that wrap the system's error in one of their own."""
    run = run_of(tmp_path / "run", settings())
    (config := tmp_path / "config.yaml").write_bytes((run / "checkpoints/step_00000007/config.yaml").read_bytes())
    by_form: dict[str, list[object]] = {
        "authors": ["--ema1", "ema_0.9", "--ema2", "ema_0.9"],
        "run": ["--config", config],
    }
    more = by_form.get(form, [])
    assert main(["--checkpoint", str(run), "--to", "safetensors", "--output", str(tmp_path / "sets")]) == 0
    arguments = ["--checkpoint", tmp_path / "sets", "--to", form, "--samples", "0", "--output", tmp_path / "out", *more]
    before, limit = sorted(tmp_path.iterdir()), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limit[1]))
    try:
        with pytest.raises(UserError, match=rf"{tmp_path / 'out'}.* cannot be written \(.*File too large"):
            main([str(argument) for argument in arguments])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert sorted(tmp_path.iterdir()) == before


def test_an_upgrade_that_is_not_finite_leaves_nothing(tmp_path: Path) -> None:
    stored = BreaksLater(open_weights(run_of(tmp_path / "run", settings())))
    target = replace(settings(image_size=32, patch_size=8), diffusion=replace(stored.config.diffusion, noise_scale=4.0))
    target.run.dir = str(tmp_path / "high")
    with pytest.raises(CheckpointError, match=NOT_FINITE):
        upgrade.write_upgraded(stored, target, upgrade.plan_upgrade(stored.config, target))
    assert not (tmp_path / "high").exists()


def test_averages_that_are_not_finite_leave_nothing(tmp_path: Path) -> None:
    """The snapshots are finite, but their coefficients overflow float32."""
    snapshot = Checkpoint(next((run_of(tmp_path / "run", settings()) / "checkpoints").iterdir()))
    solution = Reconstruction(np.full((1, 1), 1e300), np.zeros(1), np.zeros(1))
    with pytest.raises(CheckpointError, match=r"of the set power_0\.100 holds values that are not finite"):
        posthoc_ema.write([tmp_path / "out/power_0.100.safetensors"], [(snapshot, "model")], [0.1], solution)
    assert not list(tmp_path.rglob("power*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held: held.pop(BROKEN), rf"{BROKEN}: absent there"),
        (lambda held: held.update(extra=torch.zeros(2)), r"extra: \(2,\) there, absent"),
        (lambda held: held.update({BROKEN: torch.zeros(3)}), rf"{BROKEN}: \(3,\) there, \(32,\) in this network"),
        (lambda held: held[BROKEN].fill_(torch.inf), f"{BROKEN} of the set model holds values that are not finite"),
    ],
)
def test_each_kind_of_broken_tensor(
    change: Callable[[dict[str, torch.Tensor]], object], message: str, tmp_path: Path
) -> None:
    stored, output = open_weights(run_of(tmp_path / "run", settings())), tmp_path / "out/model.safetensors"
    held = {name: stored.tensor("model", name) for name in stored.shapes}
    change(held)
    with (
        pytest.raises(CheckpointError, match=message),
        checked_output(output, stored.config, ["model"]) as staged,
    ):
        save_file(held, staged, description("model", stored.config))
    assert list((tmp_path / "out").iterdir()) == []


def test_metadata_that_differ_from_the_configuration_are_refused(tmp_path: Path) -> None:
    """The weights are finite, but the file states another noise scale, network or name."""
    stored = open_weights(run_of(tmp_path / "run", settings()))
    other: dict[str, tuple[Config, list[str], str]] = {
        "scale": (settings(diffusion=replace(stored.config.diffusion, noise_scale=5.0)), ["model"], "noise_scale=2"),
        "network": (settings(in_context_start=0), ["model"], r"model\.in_context_start: 1 -> 0"),
        "name": (stored.config, ["model", "ema_0.9"], "holds the weight sets model instead of model, ema_0.9"),
    }
    for name, (config, sets, message) in other.items():
        with pytest.raises(CheckpointError, match=message):
            write_model(stored, tmp_path / name, config, sets)
        assert not (tmp_path / name).exists()


def write_model(stored: StoredWeights, output: Path, config: Config, sets: list[str]) -> None:
    with checked_output(output, config, sets) as staged:
        staged.mkdir()
        write_safetensors(staged / "model.safetensors", stored, "model")


def test_an_existing_folder_keeps_its_other_files(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", settings())
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("kept")
    for name in SETS:
        arguments = ["--checkpoint", run, "--to", "safetensors", "--weights", name, "--output", tmp_path / "out"]
        assert main([str(argument) for argument in arguments]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "ema_0.9.safetensors",
        "model.safetensors",
        "notes.txt",
    ]
    assert open_weights(tmp_path / "out").weight_sets == ["model", "ema_0.9"]
    assert load_config(run / "checkpoints/step_00000007/config.yaml", stored=True) == open_weights(run).config
