"""Work in blocks of images, each with its own file in a folder named by a hash of all that determines it.

Ranks take blocks by turns and never wait for each other on the way; any number of ranks may continue what others began,
and the result depends on neither. A rank that dies costs its current block.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from jitscale import parallel
from jitscale.errors import UserError
from jitscale.files import atomic_write
from jitscale.parallel import World

logger = logging.getLogger(__name__)

FeatureArrays = dict[str, npt.NDArray[Any]]  # what feature networks say about some images

SAMPLE_BLOCKS = "samples_*/block_*.npz"  # in RUN/evaluation


class Missing(NamedTuple):
    """A block by its number, and the indices of the points under which it is not on disk."""

    number: int
    points: list[int]


def digest_of(identity: dict[str, Any]) -> str:
    """A short hash for a folder's name."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def compute_blocks(
    folders: Sequence[Path],
    count: int,
    size: int,
    compute: Callable[[Sequence[Missing]], Iterator[FeatureArrays]],
    world: World,
    *,
    keep: bool,
) -> list[FeatureArrays]:
    """Of `count` blocks of `size` images compute those that are not on disk yet, by turns; a collective call.

    There is one of `folders` for each point of a sweep; blocks of the same images are made together. `compute` makes
    the contents of this rank's missing blocks, in order. Without `keep` all blocks are computed, and sent to rank 0
    instead of written: for few images. Returns on rank 0 for each folder all blocks, concatenated; on others nothing.
    """

    def path(point: int, number: int) -> Path:
        return folders[point] / f"block_{number:06d}.npz"

    def list_missing() -> list[Missing]:
        for folder in folders if keep else ():
            folder.mkdir(parents=True, exist_ok=True)
        every = range(len(folders))
        blocks = [Missing(n, [i for i in every if not (keep and path(i, n).exists())]) for n in range(count)]
        return [block for block in blocks if block.points]

    # Listed by one rank: what the others see may have changed before they look.
    missing = parallel.on_main(list_missing)
    passing: dict[tuple[int, int], FeatureArrays] = {}

    def share() -> None:
        own = missing[world.rank :: world.size]
        places = [(point, block.number) for block in own for point in block.points]
        try:
            for place, content in zip(places, compute(own), strict=True):
                if keep:
                    with atomic_write(path(*place)) as file:
                        np.savez(file, **content)  # type: ignore[arg-type]
                else:
                    passing[place] = content
                progress.update(min(size * world.size, total - progress.n))  # the other ranks are as far
        except UserError as error:
            logger.error("rank %d: %s", world.rank, error)  # now: the others may still compute for long
            raise

    total = size * count * len(folders)
    done = total - size * sum(len(block.points) for block in missing)
    with tqdm(total=total, initial=done, unit="img", desc="generate", disable=not world.is_main) as progress:
        parallel.raise_together(share)
    gathered = {place: block for part in parallel.gather_objects(passing) for place, block in part.items()}

    def whole(point: int) -> FeatureArrays:
        places = [(point, number) for number in range(count)]
        parts = [dict(np.load(path(*place))) if keep else gathered[place] for place in places]
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    return [whole(point) for point in range(len(folders))] if world.is_main else []
