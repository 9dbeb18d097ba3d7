"""Checkpoints on disk: which ones are complete, and which ones are refused."""

import importlib.metadata
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import jitscale
from jitscale.checkpoints.format import (
    MARKER,
    Checkpoint,
    Fragment,
    Progress,
    complete_checkpoints,
    latest_checkpoint,
    step_folder,
    whole_fragments,
)
from jitscale.checkpoints.opening import open_weights
from jitscale.checkpoints.saving import prune, write_folder
from jitscale.checkpoints.weights import check_fits, shapes_of
from jitscale.config import Config, DiffusionConfig, ModelConfig, RunConfig
from jitscale.errors import CheckpointError

SHAPES = {"first": (3, 4), "second": (5,)}
TINY = ModelConfig(image_size=16, patch_size=8, hidden_size=16, depth=1, num_heads=1, bottleneck_dim=4, num_classes=3)


def write(run_dir: Path, step: int) -> Path:
    flats = [torch.arange(12.0) + step, torch.arange(5.0) - step]
    progress = Progress(step, 8 * step, step, {"seed": 0})
    sets = {"model": flats, "ema_0.9": [flat / 2 for flat in flats], "exp_avg": [flat * 2 for flat in flats]}
    config = Config(run=RunConfig(max_steps=9))
    return write_folder(step_folder(run_dir, progress.step), progress, config, whole_fragments(SHAPES), sets)


def test_round_trip(tmp_path: Path) -> None:
    folder = write(tmp_path, 3)
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.path == folder == tmp_path / "checkpoints" / "step_00000003"
    assert checkpoint.progress == Progress(3, 24, 3, {"seed": 0})
    assert checkpoint.weight_sets == ["model", "ema_0.9"]
    assert checkpoint.config.run.max_steps == 9
    assert torch.equal(checkpoint.tensor("ema_0.9", "first"), (torch.arange(12.0) + 3).view(3, 4) / 2)
    assert torch.equal(checkpoint.read("model", "first", 5, 7), torch.tensor([8.0, 9.0]))


def test_a_parameter_split_over_files_is_read_across_them(tmp_path: Path) -> None:
    """Two ranks wrote one fragment of the parameter each."""
    flats = [torch.arange(7.0), torch.arange(7.0, 12.0)]
    fragments = [Fragment("first", (3, 4), 0, 0, 7, 0), Fragment("first", (3, 4), 1, 0, 5, 7)]
    write_folder(step_folder(tmp_path, 1), Progress(1, 1, 1, None), Config(), fragments, {"model": flats})
    checkpoint = Checkpoint(step_folder(tmp_path, 1))
    assert torch.equal(checkpoint.tensor("model", "first"), torch.arange(12.0).view(3, 4))
    assert torch.equal(checkpoint.read("model", "first", 5, 9), torch.tensor([5.0, 6.0, 7.0, 8.0]))


def test_only_a_folder_with_its_marker_is_a_checkpoint(tmp_path: Path) -> None:
    """A kill during a save or a removal leaves a folder without a marker. Such a folder stays invisible."""
    write(tmp_path, 1)
    unfinished = write(tmp_path, 2)
    (unfinished / MARKER).unlink()
    write(tmp_path, 3).rename(step_folder(tmp_path, 3).with_name("step_00000003.partial"))
    latest = latest_checkpoint(tmp_path)
    assert latest is not None
    assert latest.progress.step == 1
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        Checkpoint(unfinished)
    assert complete_checkpoints(tmp_path) == [step_folder(tmp_path, 1)]
    assert Checkpoint(write(tmp_path, 2)).progress.step == 2


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    (tmp_path / "checkpoints" / "step_00000005.partial").mkdir()
    prune(tmp_path, keep_last=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000003", "step_00000004"]


def test_a_truncated_file_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    file = folder / "rank_00000.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"rank_00000.safetensors: \d+ bytes where the index says \d+"):
        latest_checkpoint(tmp_path)


def test_a_damaged_file_is_a_one_line_error(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    file = folder / "rank_00000.safetensors"
    file.write_bytes(b"\xff" * file.stat().st_size)
    with pytest.raises(CheckpointError, match=r"rank_00000.safetensors: .*; the file is damaged, remove"):
        Checkpoint(folder).tensor("model", "first")
    for text in ("", "{}", "[]", '{"format": 2}'):
        (folder / "index.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"index\.json: "):
            Checkpoint(folder)


def test_a_gap_between_fragments_is_refused_and_not_filled_with_old_memory(tmp_path: Path) -> None:
    fragments = [Fragment("first", (3, 4), 0, 0, 5, 0), Fragment("first", (3, 4), 1, 0, 5, 7)]
    write_folder(
        step_folder(tmp_path, 1),
        Progress(1, 1, 1, None),
        Config(),
        fragments,
        {"model": [torch.ones(5), torch.ones(5)]},
    )
    with pytest.raises(CheckpointError, match="the fragments of first have a gap at 5"):
        Checkpoint(step_folder(tmp_path, 1))


def test_another_network_is_refused_and_the_differences_are_named(tmp_path: Path) -> None:
    """The stored settings are compared; if there are none, the parameters are. Another noise scale is refused too."""
    config = Config(model=replace(TINY, in_context_start=0), run=RunConfig(max_steps=1))
    shapes = shapes_of(config)

    def stored(shapes: dict[str, tuple[int, ...]], config: Config = config) -> Checkpoint:
        fragments = whole_fragments(shapes)
        flats = [torch.ones(f.length) for f in fragments]
        return Checkpoint(
            write_folder(step_folder(tmp_path, 1), Progress(1, 1, 1, None), config, fragments, {"model": flats})
        )

    fits = stored(shapes)
    check_fits(fits, config)
    with pytest.raises(CheckpointError, match=r"another network \(model.depth: 1 -> 2\); restore these settings"):
        check_fits(fits, replace(config, model=replace(config.model, depth=2)))
    with pytest.raises(CheckpointError, match=r"trained with diffusion.noise_scale=1.0, the config says 2.0"):
        check_fits(fits, replace(config, diffusion=DiffusionConfig(noise_scale=2.0)))
    first, second, *_ = shapes
    wrong = {**shapes, first: (4, 4), "third": (1,)}
    del wrong[second]
    with pytest.raises(CheckpointError) as error:
        check_fits(stored(wrong), config)
    assert f"{first}: (4, 4) there, {shapes[first]} in this network" in str(error.value)
    assert f"{second}: absent there" in str(error.value)
    assert "third: (1,) there, absent in this network" in str(error.value)


def test_a_missing_weight_set_is_named(tmp_path: Path) -> None:
    write(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"no weight set 'ema_0.5'; choose one of model, ema_0.9"):
        open_weights(tmp_path).network("ema_0.5")
    with pytest.raises(CheckpointError, match="no weight set 'exp_avg'"):
        open_weights(tmp_path).network("exp_avg")
    with pytest.raises(CheckpointError, match="no complete checkpoint there"):
        open_weights(tmp_path / "checkpoints")


def test_a_checkout_without_installation_writes_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the checkout nor a DeepSpeed on PYTHONPATH has package metadata that states a version."""

    def absent(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    versions = json.loads((write(tmp_path, 1) / "index.json").read_text())["versions"]
    assert versions["jitscale"] == jitscale.__version__
    assert versions["torch"] == torch.__version__
    assert versions["deepspeed"] == "unknown"


def test_an_unwritable_folder_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 1)
    blocked = step_folder(tmp_path, 2).with_name("step_00000002.partial")
    blocked.write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write(tmp_path, 2)
    latest = latest_checkpoint(tmp_path)
    assert latest is not None
    assert latest.progress.step == 1
