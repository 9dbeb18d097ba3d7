"""Work in blocks of images, each with its own file in a folder named by a hash of all that determines it.

Ranks take blocks by turns and never wait for each other on the way; any number of ranks may continue what others began,
and the result depends on neither. A rank that dies costs its current block.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from jitscale import parallel
from jitscale.files import appearing_whole
from jitscale.parallel import World

Block = dict[str, npt.NDArray[Any]]


def digest_of(identity: dict[str, Any]) -> str:
    """A short hash for a folder's name."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def compute_blocks(
    folder: Path, count: int, size: int, compute: Callable[[int], Block], world: World, description: str
) -> Block:
    """Compute the blocks that are not on disk yet, by turns; a collective call.

    Args:
        folder: of the files.
        count: how many blocks.
        size: images of a block, for the progress bar.
        compute: the content of a block, by its number.
        world: this rank.
        description: of the progress bar.

    Returns:
        On rank 0 all blocks, concatenated; on the others empty features.
    """
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
    # Listed by one rank: what the others see may have changed before they look.
    missing = parallel.broadcast_object([number for number in range(count) if not _block_path(folder, number).exists()])

    def share() -> None:
        for turn in range(world.rank, len(missing), world.size):
            content = compute(missing[turn])
            with appearing_whole(_block_path(folder, missing[turn])) as file:
                np.savez(file, **content)  # type: ignore[arg-type]
            progress.update(min(world.size, len(missing) - turn) * size)  # the other ranks are as far

    with tqdm(
        total=count * size,
        initial=(count - len(missing)) * size,
        unit="img",
        desc=description,
        disable=not world.is_main,
    ) as progress:
        parallel.together(share)
    if not world.is_main:
        return {"features": np.empty((0, 0))}
    parts = [dict(np.load(_block_path(folder, number))) for number in range(count)]
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def _block_path(folder: Path, number: int) -> Path:
    return folder / f"block_{number:06d}.npz"
