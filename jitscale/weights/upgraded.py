"""Checkpoints of another resolution, written from stored weights one tensor at a time."""

from __future__ import annotations

from pathlib import Path

import torch
from tqdm import tqdm

from jitscale.config import Config, to_yaml
from jitscale.errors import ConfigError, UserError
from jitscale.files import appearing_whole
from jitscale.model.jit import JiT
from jitscale.training.checkpoint import MOMENTS, Progress, complete_checkpoints, step_folder, write_streamed
from jitscale.upgrade import Upgrade
from jitscale.weights.stored import StoredWeights


def shapes_of(config: Config) -> dict[str, tuple[int, ...]]:
    """Parameter name -> shape of a network, without its memory."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in JiT(config.model).named_parameters()}


def check_target(stored: StoredWeights, target: Config, upgrade: Upgrade) -> None:
    """Every parameter of the target is one of the source's, or a resized one.

    Raises:
        ConfigError: naming what is not.
    """
    new = shapes_of(target)
    differing = [
        f"{name}: {stored.shapes.get(name, 'absent')} there, {new.get(name, 'absent')} in the target"
        for name in sorted({*stored.shapes, *new})
        if stored.shapes.get(name) != new.get(name) and not (name in upgrade.resized and name in stored.shapes)
    ]
    if differing:
        raise ConfigError(f"the target is another network than {stored.path} ({'; '.join(differing)})")


def write_upgraded(
    stored: StoredWeights, target: Config, upgrade: Upgrade, *, keep_moments: bool = True
) -> tuple[Path, list[str]]:
    """A run at step 0 in `target.run.dir`, with all weight sets, and the moments of what was not resized.

    Args:
        stored: the source, verified.
        target: the new run.
        upgrade: from the network of `stored` to that of `target`.
        keep_moments: False leaves all the optimizer's moments out.

    Returns:
        The checkpoint's folder, and the names of the sets in it, moments included.

    Raises:
        UserError: the target's folder holds checkpoints.
        ConfigError: the target is another network.
        CheckpointError: the source is damaged, there is no room, or the target cannot be written.
    """
    run_dir = Path(target.run.dir)
    if complete_checkpoints(run_dir):
        raise UserError(f"{run_dir}: holds checkpoints already; choose another output")
    check_target(stored, target, upgrade)
    moments = stored.moments if keep_moments and target.optim.name == "adamw" else ()
    sets = [*stored.weight_sets, *moments]
    new = shapes_of(target)
    progress = Progress(step=0, images=0, optimizer_step=stored.optimizer_step if moments else 0, data=None)
    with tqdm(total=len(new) * len(sets), unit="tensor", desc="upgrade") as bar:

        def tensor(set_name: str, parameter: str) -> torch.Tensor:
            bar.update()
            if set_name in MOMENTS and parameter in upgrade.resized:
                return torch.zeros(new[parameter])
            return upgrade.tensor(parameter, stored.tensor(set_name, parameter))

        folder = write_streamed(step_folder(run_dir, 0), progress, target, new, sets, tensor)
    with appearing_whole(run_dir / "config.yaml") as file:
        file.write(to_yaml(target).encode())
    return folder, sets
