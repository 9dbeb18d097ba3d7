"""Snapshots of the power-function averages, from which tools/posthoc_ema.py makes averages of any width.

    snapshots/images_000001048576/
        rank_00000.safetensors ... index.json, config.yaml, COMPLETE: as in a checkpoint

They are read with `Checkpoint`, on any number of ranks, and are never pruned. Their position in the run is a function
of the images seen, so that a resumed run writes those again that its checkpoint does not know of, in their place.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from jitscale.config import Config
from jitscale.training.checkpoint import MARKER, Fragment, Progress, write_folder

logger = logging.getLogger(__name__)

_FOLDER = re.compile(r"images_(\d{12,})")


def write_snapshot(
    run_dir: Path,
    progress: Progress,
    config: Config,
    fragments: Sequence[Fragment],
    sets: Mapping[str, Sequence[torch.Tensor]],
) -> Path:
    """Write this rank's fragments of all `sets`; a collective call. Returns the complete folder.

    Raises:
        CheckpointError: on every rank, if any rank could not write.
    """
    return write_folder(snapshot_folder(run_dir, progress.images), progress, config, fragments, sets)


def snapshot_folder(run_dir: Path, images: int) -> Path:
    """The folder of the snapshot after `images` images."""
    return run_dir / "snapshots" / f"images_{images:012d}"


def complete_snapshots(run_dir: Path) -> dict[int, Path]:
    """All complete snapshot folders of a run by the images seen, oldest first."""
    folders = (run_dir / "snapshots").glob("images_*")
    found = {int(m[1]): f for f in folders if (m := _FOLDER.fullmatch(f.name)) and (f / MARKER).exists()}
    return dict(sorted(found.items()))


def remove_snapshots_after(run_dir: Path, images: int) -> None:
    """Remove what an abandoned continuation of the run wrote after `images` images, and what interrupted saves left.

    A run goes on from its newest checkpoint, and with other settings it might pass other points than before.
    """
    for seen, folder in complete_snapshots(run_dir).items():
        if seen > images:
            logger.info("%s: newer than the checkpoint the run goes on from; removed, to be written again", folder)
            (folder / MARKER).unlink()  # first, so that a kill during the removal leaves nothing that looks complete
    for folder in (run_dir / "snapshots").glob("images_*"):
        if not (folder / MARKER).exists() or folder.suffix == ".partial":
            shutil.rmtree(folder)
