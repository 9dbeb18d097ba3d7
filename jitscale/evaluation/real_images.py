"""Statistics and features of real images: computed once by all ranks, and found again by every later run.

It belongs to the content of the shards, the weights of the feature network, the size and the crop, and to nothing else:

CACHE/<network>_<hash>/statistics.npz   mean and covariance of each part
CACHE/<network>_<hash>/features.npy     (M, F) float32: images chosen by hash, in a random order
CACHE/<network>_<hash>/facts.json       written last: where it comes from, hashes of the files, distances of the halves

Shapes: N images, F features.
"""

from __future__ import annotations

import json
import logging
import math
import secrets
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from jitscale import parallel
from jitscale.config import Config
from jitscale.data.shards import ShardSet
from jitscale.errors import ConfigError, DataError, UserError
from jitscale.evaluation.blocks import Block, digest_of
from jitscale.evaluation.networks import NetworkFile
from jitscale.files import aside_pattern, atomic_write, exclusive_or_not, sha256_of
from jitscale.keyed_random import Int64Array, Purpose, permutation
from jitscale.parallel import World

if TYPE_CHECKING:
    from jitscale.evaluation.metrics import FrechetDistance

logger = logging.getLogger(__name__)

CACHE = "real_images"  # the folder's name beside the shards
KEPT_FEATURES = 50_000  # images whose features are kept, for what compares pairs of images
BLOCK = 64  # images that go through the network together
MOST_PARTS = 64  # into which the work is divided, whatever the number of ranks
ROWS = 1024  # of features that are added to a covariance at once
HALVES = 2  # of the images: the distance between them is the floor of all distances
WAIT_SECONDS = 2.0  # between two looks at what another run computes


def cache_folders(config: Config, shards: ShardSet, run_dir: Path, world: World) -> list[Path]:
    """Where statistics of the real images may be, the folder for new ones last; a collective call.

    Raises:
        ConfigError: `evaluation.cache_dir` cannot be written by rank 0, or is not seen by all ranks.
    """
    own, asked = run_dir / "evaluation" / CACHE, config.evaluation.cache_dir
    if not shards.is_hashed:
        return [own]  # nothing vouches for the content of tars without a manifest: another run might see others
    if asked is None and shards.folder is None:
        return [own]
    wanted = Path(asked) if asked is not None else shards.folder / CACHE  # type: ignore[operator]
    probe = wanted / f".probe_{parallel.broadcast_object(secrets.token_hex(8))}"
    fault = parallel.on_main(lambda: _cannot_write(probe))
    if parallel.any_rank(fault is None and not probe.exists()):
        fault = "not every rank sees it"
    if world.is_main:
        with suppress(OSError):  # where it could not be made it cannot be removed
            probe.unlink()
    if fault is None:
        return [wanted]
    if asked is not None:
        raise ConfigError(f"evaluation.cache_dir={asked}: cannot be used ({fault}); choose another folder")
    if world.is_main:
        logger.info("%s: cannot be used (%s); new statistics of real images are kept in %s", wanted, fault, own)
    return [wanted, own]


def _cannot_write(probe: Path) -> str | None:
    """Make a file, and say why that was not possible."""
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
    except OSError as error:
        return str(error)
    return None


class RealImages:
    """Statistics and features of the images of some shards in one network: computed by all ranks of a run, and kept."""

    def __init__(self, file: NetworkFile, shards: ShardSet, folders: Sequence[Path]) -> None:
        """Find what is kept; a collective call.

        Args:
            file: the network.
            shards: the real images.
            folders: from `cache_folders`.
        """
        self.file = file
        self._shards = shards
        self.identity: dict[str, Any] = {
            "manifest": shards.manifest_hash,
            "network": self.file.name,
            "network_sha256": self.file.sha256,
            "image_size": shards.image_size,
            "crop": "adm",  # how images are brought to that size while they are read
        }
        places = [folder / f"{self.file.name}_{digest_of(self.identity)}" for folder in folders]
        complete = parallel.on_main(lambda: [place for place in places if (place / "facts.json").exists()])
        self.folder = [*complete, places[-1]][0]
        self._total = shards.num_samples
        # Enough images for a part's sums to be smaller than its features, and few parts where there are many images.
        width = max(self.file.sizes.values())
        self._per_part = BLOCK * math.ceil(max(2 * width, self._total / MOST_PARTS) / BLOCK)
        self._parts = -(-self._total // self._per_part)

    def bytes_to_write(self) -> int:
        """What computing takes on disk at most, parts that are removed in the end included; 0 if all is there."""
        if (self.folder / "facts.json").exists():
            return 0
        square = sum(width * width for width in self.file.sizes.values())
        kept = min(KEPT_FEATURES, self._total) * next(iter(self.file.sizes.values()))
        return 8 * square * (self._parts * HALVES + 1) + 4 * 2 * kept

    def compute_once(self, network: Callable[[torch.Tensor], Block], world: World) -> None:
        """Compute what is not there, unless another run is doing so: then wait for it; a collective call.

        Args:
            network: from uint8 images (B, 3, height, width) to their parts of a block.
            world: this rank.

        Raises:
            DataError: on every rank: an image cannot be read, or the cache cannot be written.
        """
        with ExitStack() as held:
            said = False
            while (state := parallel.on_main(lambda: self._state(held))) == "wait":
                if world.is_main and not said:
                    logger.info("%s: another run computes the statistics of these real images; waiting", self.folder)
                    said = True
                time.sleep(WAIT_SECONDS)
            if state == "compute":
                self._compute(network, world)

    def _state(self, held: ExitStack) -> str:
        """ready; compute, where this run now has the lock; or wait. Asked on one rank."""
        try:
            if (self.folder / "facts.json").exists():
                return "ready"
            self.folder.mkdir(parents=True, exist_ok=True)
            with ExitStack() as attempt:
                if not attempt.enter_context(exclusive_or_not(self.folder / ".lock")):
                    return "wait"
                if (self.folder / "facts.json").exists():  # completed since the first look
                    return "ready"
                held.push(attempt.pop_all())
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        return "compute"

    def _compute(self, network: Callable[[torch.Tensor], Block], world: World) -> None:
        """Parts by turns, each a file, then their sum; what a killed run has left is used."""
        missing = parallel.broadcast_object([n for n in range(self._parts) if not self._part_path(n).exists()])
        halves = np.ones(self._total, np.int8)
        halves[permutation(self._total, 0, Purpose.REFERENCE_HALVES)[: self._total // 2]] = 0
        chosen = permutation(self._total, 0, Purpose.REFERENCE_FEATURES)[:KEPT_FEATURES]

        images = sum(len(self._ids(part)) for part in missing)

        def on_images(count: int) -> None:
            progress.update(min(count * world.size, images - progress.n))  # the other ranks are as far

        def share() -> None:
            for part in missing[world.rank :: world.size]:
                try:
                    content = self._part(network, part, halves, chosen, on_images)
                    with atomic_write(self._part_path(part)) as file:
                        np.savez(file, **content)  # type: ignore[arg-type]
                except OSError as error:
                    raise _unwritable(self.folder, error) from error
                except ValueError as error:
                    if not isinstance(error, UserError):
                        error = DataError(f"{self.file.path}: says nothing usable of real images ({error})")
                    logger.error("rank %d: %s", world.rank, error)  # now: the others may still compute for long
                    raise error from None

        description = f"real images, {self.file.name}"
        with tqdm(total=images, unit="img", desc=description, disable=not world.is_main) as progress:
            parallel.raise_together(share)
        parallel.on_main(lambda: self._finish(len(chosen)))

    def _part(
        self,
        network: Callable[[torch.Tensor], Block],
        part: int,
        halves: npt.NDArray[np.int8],
        chosen: Int64Array,
        on_images: Callable[[int], None],
    ) -> Block:
        """Sums over both halves of some images, of each part of a block, and the features to keep."""
        sums = self._distances_of_halves()
        ids = self._ids(part)
        main = next(iter(self.file.sizes))
        places = np.flatnonzero((chosen >= ids.start) & (chosen < ids.stop))
        kept = np.empty((len(places), self.file.sizes[main]), np.float32)
        for rows, features in self._features(network, ids, on_images):
            for name, values in features.items():
                for half in range(HALVES):
                    sums[name].update(values[halves[rows.start : rows.stop] == half], real=half == 1)
            own = (chosen[places] >= rows.start) & (chosen[places] < rows.stop)
            kept[own] = features[main][chosen[places][own] - rows.start]
        content: Block = {"places": places, "kept": kept}
        for name, sum_ in sums.items():
            content |= {f"{name}/{key}": np.asarray(value) for key, value in sum_.metric_state.items()}
        return content

    def _distances_of_halves(self) -> dict[str, FrechetDistance]:
        """Of no images, for each part of a block."""
        from jitscale.evaluation.metrics import FrechetDistance  # noqa: PLC0415 (slow)

        return {name: FrechetDistance(width) for name, width in self.file.sizes.items()}

    def _features(
        self, network: Callable[[torch.Tensor], Block], ids: range, on_images: Callable[[int], None]
    ) -> Iterator[tuple[range, Block]]:
        """Of at most `ROWS` images at a time, in order."""
        blocks: list[Block] = []
        start = ids.start
        for images in self._images(ids):
            found = network(images)
            blocks.append({name: found[name] for name in self.file.sizes})
            on_images(len(images))
            stop = start + sum(len(next(iter(block.values()))) for block in blocks)
            if stop - start >= ROWS or stop == ids.stop:
                yield range(start, stop), {name: np.concatenate([b[name] for b in blocks]) for name in self.file.sizes}
                blocks, start = [], stop

    def _images(self, ids: range) -> Iterator[torch.Tensor]:
        """uint8 (B, 3, S, S), at most `BLOCK` at a time; a thread decodes the next ones while these are used."""
        starts = range(ids.start, ids.stop, BLOCK)

        def read(first: int) -> torch.Tensor:
            samples = range(first, min(first + BLOCK, ids.stop))
            images = np.stack([self._shards.read(*self._shards.shard_and_index(sample))[0] for sample in samples])
            return torch.from_numpy(images).permute(0, 3, 1, 2)

        with ThreadPoolExecutor(1) as thread:
            ahead = thread.submit(read, starts[0])
            for following in (*starts[1:], None):
                images = ahead.result()
                if following is not None:
                    ahead = thread.submit(read, following)
                yield images

    def _finish(self, kept: int) -> None:
        """Sum up the parts, in their order whoever made them, and write what is kept."""
        sums = self._distances_of_halves()
        main = next(iter(self.file.sizes))
        features = np.empty((kept, self.file.sizes[main]), np.float32)
        try:
            for part in range(self._parts):
                with np.load(self._part_path(part)) as content:
                    features[content["places"]] = content["kept"]
                    for name, sum_ in sums.items():
                        state = {key: torch.from_numpy(content[f"{name}/{key}"]) for key in sum_.metric_state}
                        sum_.merge_state(state)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            if (self.folder / "facts.json").exists():
                return  # on a file system without locks another run was faster, and has removed the parts
            raise DataError(
                f"{self._part_path(part)}: cannot be read ({error}); remove it and start again, it is then made again"
            ) from error
        try:
            arrays: Block = {}
            for name, sum_ in sums.items():
                arrays[f"all/{name}/mean"], arrays[f"all/{name}/covariance"] = sum_.gaussian("real", "fake")
            floors = {name: float(sum_.compute()) for name, sum_ in sums.items()}
            kernel, deviation = _kernel_floor(features)
            with atomic_write(self.folder / "statistics.npz") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
            with atomic_write(self.folder / "features.npy") as file:
                np.save(file, features)
            facts = {
                **self.identity,
                "images": self._total,
                "stored": self._shards.stored,
                "floors": {**floors, "kid": kernel, "kid_std": deviation},
                "files": {name: sha256_of(self.folder / name) for name in ("statistics.npz", "features.npy")},
            }
            with atomic_write(self.folder / "facts.json") as file:
                file.write(json.dumps(facts, indent=1).encode())
            for path in (*self.folder.glob("part_*.npz"), *self.folder.glob(aside_pattern("part_*.npz"))):
                path.unlink(missing_ok=True)
        except OSError as error:
            raise _unwritable(self.folder, error) from error

    def read(self) -> tuple[Block, npt.NDArray[np.float32], dict[str, Any]]:
        """Statistics, features and facts, with all hashes compared.

        Raises:
            DataError: the cache is damaged.
        """
        try:
            facts = json.loads((self.folder / "facts.json").read_text())
            differing = [name for name, digest in facts["files"].items() if sha256_of(self.folder / name) != digest]
            if differing:
                raise ValueError(f"{differing[0]} has another sha256 than when it was written")
            with np.load(self.folder / "statistics.npz") as content:
                statistics = dict(content)
            return statistics, np.load(self.folder / "features.npy"), facts
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(
                f"{self.folder}: statistics of the real images are damaged ({error}); remove the folder, they are then "
                "computed again"
            ) from error

    def _ids(self, part: int) -> range:
        return range(part * self._per_part, min((part + 1) * self._per_part, self._total))

    def _part_path(self, part: int) -> Path:
        return self.folder / f"part_{part:03d}.npz"


def _kernel_floor(features: npt.NDArray[np.float32]) -> tuple[float, float]:
    """The kernel distance of one half of the features, which are in a random order, to the other."""
    from jitscale.evaluation.metrics import kernel_distance  # noqa: PLC0415 (slow)

    half = len(features) // 2
    return kernel_distance(features[:half], features[half:])


def _unwritable(folder: Path, error: OSError) -> DataError:
    return DataError(f"{folder}: cannot be written ({error}); make room, or set evaluation.cache_dir")
