"""Work in blocks of images. Each block has a file; the name of its folder is a hash of all that determines the content.

Ranks take blocks in turn, and do not wait for each other in between. Any number of ranks may continue the work of
others, and the result does not depend on the number. If a rank dies, only its current block is lost.
"""

import hashlib
import json
import logging
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from jitscale import parallel
from jitscale.errors import DataError, UserError, data_error
from jitscale.files import atomic_write
from jitscale.parallel import World

logger = logging.getLogger(__name__)

FeatureArrays = dict[str, npt.NDArray[Any]]  # outputs of feature networks for some images, by name

# Reading a damaged file raises one of these.
DAMAGED = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError),
    *(EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError),
)
SAMPLE_BLOCKS = "samples_*/block_*.npz"  # in RUN/evaluation


class Missing(NamedTuple):
    """A block that is not on disk for some points of a sweep: its number, and the indices of these points."""

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
    """Compute the blocks, `count` of `size` images each, that are not on disk yet; a collective call.

    Ranks take blocks in turn. Each point of a sweep has one of `folders`; blocks of the same images are computed
    together. `compute` yields the contents of this rank's missing blocks, in order.

    Without `keep`, all blocks are computed, and sent to rank 0 instead of written; this is for few images. Returns, on
    rank 0, the concatenated blocks of each folder; on other ranks an empty list.

    A damaged block is computed again. Raises a DataError on every rank if a block is damaged again right after it was
    written, a StorageError if one cannot be written.
    """

    def path(point: int, number: int) -> Path:
        return folders[point] / f"block_{number:06d}.npz"

    def list_missing() -> list[Missing]:
        for folder in folders if keep else ():
            folder.mkdir(parents=True, exist_ok=True)
        every = range(len(folders))
        blocks = [Missing(n, [i for i in every if not (keep and path(i, n).exists())]) for n in range(count)]
        return [block for block in blocks if block.points]

    passing: dict[tuple[int, int], FeatureArrays] = {}
    whole: list[FeatureArrays] = []

    def share(missing: Sequence[Missing], progress: "tqdm[Any]", total: int) -> None:
        own = missing[world.rank :: world.size]
        places = [(point, block.number) for block in own for point in block.points]
        try:
            for place, content in zip(places, compute(own), strict=True):
                if keep:
                    file_path = path(*place)
                    with data_error(f"{file_path}: cannot be written", "make room"), atomic_write(file_path) as file:
                        np.savez(file, **content)  # type: ignore[arg-type]
                else:
                    passing[place] = content
                progress.update(min(size * world.size, total - progress.n))  # assumes that other ranks are as far
        except UserError as error:
            logger.error("rank %d: %s", world.rank, error)  # at once: other ranks may compute for hours
            raise

    def compute_missing() -> None:
        # Only rank 0 lists the files, because other ranks might list them later and see other files.
        missing = parallel.on_main(list_missing)
        total = size * count * len(folders)
        done = total - size * sum(len(block.points) for block in missing)
        with tqdm(total=total, initial=done, unit="img", desc="generate", disable=not world.is_main) as progress:
            parallel.raise_together(lambda: share(missing, progress, total))

    def read_all() -> list[Path]:
        """Fill `whole`; returns damaged files, which are removed."""
        damaged = []
        for point in range(len(folders)):
            parts: dict[Path, FeatureArrays] = {}
            for file in (path(point, number) for number in range(count)):
                with suppress(*DAMAGED):
                    parts[file] = _read(file, size)
            usual = Counter(map(_form, parts.values())).most_common(1)
            parts = {file: part for file, part in parts.items() if _form(part) == usual[0][0]}
            damaged += [file for number in range(count) if (file := path(point, number)) not in parts]
            whole.append(_concatenated(list(parts.values())))
        for file in damaged:
            logger.warning("%s: damaged; it is computed again", file)
            file.unlink(missing_ok=True)
        return damaged

    compute_missing()
    if not keep:
        gathered = {place: block for part in parallel.gather_objects(passing) for place, block in part.items()}
        points = range(len(folders)) if world.is_main else ()
        return [_concatenated([gathered[point, number] for number in range(count)]) for point in points]
    if parallel.on_main(read_all):
        whole.clear()
        compute_missing()
        if damaged := parallel.on_main(read_all):
            raise DataError(f"{damaged[0]}: damaged right after it was written; check the disk")
    return whole


def _read(file: Path, size: int) -> FeatureArrays:
    """Read a block of `size` images. Raises one of DAMAGED if the file is damaged."""
    with np.load(file) as content:
        arrays = dict(content)
    if not arrays or any(len(array) != size for array in arrays.values()):
        raise ValueError(f"no {size} images in it")
    return arrays


def _form(arrays: FeatureArrays) -> tuple[object, ...]:
    """The names, dtypes and shapes of one image's arrays, which must be the same in all blocks."""
    return tuple(sorted((name, array.dtype.str, array.shape[1:]) for name, array in arrays.items()))


def _concatenated(parts: Sequence[FeatureArrays]) -> FeatureArrays:
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]} if parts else {}
