"""Work in blocks of images, each with its own file in a folder named by a hash of all that determines it.

Ranks take blocks by turns and never wait for each other on the way; any number of ranks may continue what others began,
and the result depends on neither. A rank that dies costs its current block.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from jitscale import parallel
from jitscale.errors import UserError
from jitscale.files import atomic_write
from jitscale.parallel import World

logger = logging.getLogger(__name__)

Block = dict[str, npt.NDArray[Any]]


def digest_of(identity: dict[str, Any]) -> str:
    """A short hash for a folder's name."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def compute_blocks(
    folders: Sequence[Path],
    count: int,
    size: int,
    compute: Callable[[int, Sequence[int], int | None], Iterable[Block]],
    world: World,
    description: str,
) -> list[Block]:
    """Compute the blocks that are not on disk yet, by turns; a collective call.

    Args:
        folders: of the files: several for blocks of the same images under several settings, which are made together.
        count: how many blocks.
        size: images of a block, for the progress bar.
        compute: from a block's number and indices into `folders`, the contents of the block there; the third argument
            is the number of the block that follows on this rank, None after the last one.
        world: this rank.
        description: of the progress bar.

    Returns:
        On rank 0 for each folder all blocks, concatenated; on the others empty features.
    """
    if world.is_main:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
    # Listed by one rank: what the others see may have changed before they look.
    missing = parallel.broadcast_object(_missing(folders, count))
    images = size * sum(len(settings) for _, settings in missing)

    def share() -> None:
        try:
            own_blocks()
        except UserError as error:
            logger.error("rank %d: %s", world.rank, error)  # now: the others may still compute for long
            raise

    def own_blocks() -> None:
        for turn in range(world.rank, len(missing), world.size):
            number, settings = missing[turn]
            following = missing[turn + world.size][0] if turn + world.size < len(missing) else None
            for setting, content in zip(settings, compute(number, settings, following), strict=True):
                with atomic_write(_block_path(folders[setting], number)) as file:
                    np.savez(file, **content)  # type: ignore[arg-type]
            others = missing[turn : turn + world.size]  # the other ranks are as far
            progress.update(size * sum(len(settings) for _, settings in others))

    total = count * size * len(folders)
    with tqdm(total=total, initial=total - images, unit="img", desc=description, disable=not world.is_main) as progress:
        parallel.raise_together(share)
    if not world.is_main:
        return [{"features": np.empty((0, 0))} for _ in folders]
    return [_read(folder, count) for folder in folders]


def _missing(folders: Sequence[Path], count: int) -> list[tuple[int, list[int]]]:
    """Block numbers, and where each is missing."""
    found = []
    for number in range(count):
        settings = [index for index, folder in enumerate(folders) if not _block_path(folder, number).exists()]
        if settings:
            found.append((number, settings))
    return found


def _read(folder: Path, count: int) -> Block:
    parts = [dict(np.load(_block_path(folder, number))) for number in range(count)]
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def _block_path(folder: Path, number: int) -> Path:
    return folder / f"block_{number:06d}.npz"
