"""Statistics and features of real images: all ranks compute them once, and later runs find them again.

They depend only on the content of the shards, the weights of the feature network, the image size and the crop:

CACHE/<network>_<hash>/statistics.npz   mean and covariance of each of the feature arrays
CACHE/<network>_<hash>/features.npy     (M, F) float32: images chosen by hash, in a random order
CACHE/<network>_<hash>/facts.json       written last: their origin, hashes of the files, distances between the halves
CACHE/<network>_<hash>/part_*.npz       until then: the sums over each share of the work

A share of the work is not a shard of the data. Its sums take 130 MB for Inception's features.
"""

from __future__ import annotations

import json
import logging
import math
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from functools import cached_property
from itertools import islice, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from jitscale import parallel
from jitscale.config import RGB, Config
from jitscale.data.passes import read_once
from jitscale.data.shards import ShardSet
from jitscale.data.workers import naming_dead_workers
from jitscale.errors import ConfigError, DataError, UserError, data_error
from jitscale.evaluation.blocks import DAMAGED, SAMPLE_BLOCKS, FeatureArrays, digest_of
from jitscale.evaluation.networks import NetworkFile
from jitscale.files import aside_pattern, atomic_write, exclusive_or_not, sha256_of
from jitscale.keyed_random import Int64Array, Purpose, permutation
from jitscale.parallel import World

if TYPE_CHECKING:
    from jitscale.evaluation.metrics import FrechetDistance

Network = Callable[[torch.Tensor], FeatureArrays]

logger = logging.getLogger(__name__)

CACHE = "real_images"  # the folder's name next to the shards
KEPT_FEATURES = 50_000  # images whose features are kept, for metrics that compare pairs of images
BLOCK = 64  # images that go through the network together
MOST_SHARES = 64  # shares of the work, for any number of ranks
ROWS = 1024  # images whose features are added to a covariance at once
HALVES = 2  # the distance between the two halves of the images is the floor of all distances
REMEDY = "make room, or set evaluation.cache_dir"  # if the cache cannot be written
WAIT_SECONDS = 2.0  # between two checks of another run's progress


def cache_folders(config: Config, shards: ShardSet, run_dir: Path, world: World) -> list[Path]:
    """Folders that may hold statistics of the real images; the last one is for new statistics. A collective call.

    Raises a ConfigError if rank 0 cannot write `evaluation.cache_dir`, or not every rank sees it.
    """
    own, asked = run_dir / "evaluation" / CACHE, config.evaluation.cache_dir
    folder = shards.folder if asked is None else Path(asked)
    if folder is None or not shards.is_hashed:
        return [own]  # remote shards, or tars without hashes in a manifest: another run might find other content
    wanted = folder / CACHE if asked is None else folder
    probe = wanted / f".probe_{parallel.broadcast_object(secrets.token_hex(8))}"

    def make_probe() -> str:
        try:
            wanted.mkdir(parents=True, exist_ok=True)
            probe.touch()
        except OSError as error:
            return str(error)
        return ""

    fault = parallel.on_main(make_probe)
    if not fault:
        seen = not parallel.any_rank(not probe.exists())
        if world.is_main:
            probe.unlink(missing_ok=True)
        if seen:
            return [wanted]
        fault = "not every rank sees it"
    if asked is not None:
        raise ConfigError(f"evaluation.cache_dir={asked}: cannot be used ({fault}); choose another folder")
    if world.is_main:
        logger.info("%s: cannot be used (%s); new statistics of real images are written to %s", wanted, fault, own)
    return [wanted, own]


def finished_parts(config: Config) -> int:
    """The progress of a run's measurements: the number of files that a restart does not compute again.

    They are blocks of samples, and sums over real images in any folder that `cache_folders` may choose.
    """
    evaluation, own = config.evaluation, Path(config.run.dir) / "evaluation"
    if evaluation.cache_dir is not None:
        shared = Path(evaluation.cache_dir)
    else:
        size = evaluation.reference_size or config.model.image_size
        shards = Path((evaluation.reference or config.data.shards).replace("{resolution}", str(size)))
        # A glob or brace pattern ends in .tar; its tars are in one folder.
        shared = (shards.parent if shards.suffix == ".tar" else shards) / CACHE
    sums = {path for folder in (own / CACHE, shared) for path in folder.glob("*_*/part_*.npz")}
    return len(sums) + len(list(own.glob(SAMPLE_BLOCKS)))


def pixels_of(shards: ShardSet) -> dict[str, Any]:
    """Everything that determines the pixels of the images of `shards` as they are read."""
    # RGB images have no key "channels": statistics from before grey images were supported are still found.
    grey = {} if shards.channels == RGB else {"channels": shards.channels}
    return {"manifest": shards.manifest_hash, "image_size": shards.image_size, **grey}


class RealImages:
    """Statistics and features of the images of `shards` in one network; all ranks compute them, and they are stored."""

    def __init__(self, file: NetworkFile, shards: ShardSet, folders: Sequence[Path]) -> None:
        """Choose one of `folders` (from `cache_folders`) for `shards` in the network `file`; a collective call."""
        self.file, self._shards, self._images = file, shards, range(shards.num_samples)
        self.class_names = shards.class_names
        self._main = next(iter(file.sizes))  # the array whose features are kept
        self.identity: dict[str, Any] = {
            **pixels_of(shards),
            "network": file.name,
            "network_sha256": file.sha256,
            "crop": "adm",  # how images are resized to that size while they are read
            **({"arrays": list(file.sizes)} if file.suffix else {}),  # a further network has other arrays
        }
        places = [folder / f"{file.name}_{digest_of(self.identity)}" for folder in folders]
        complete = parallel.on_main(lambda: [place for place in places if (place / "facts.json").exists()])
        self.folder = [*complete, places[-1]][0]
        # A share has so many images that its sums are smaller than its features, and there are at most MOST_SHARES.
        size = BLOCK * math.ceil(max(2 * max(file.sizes.values()), len(self._images) / MOST_SHARES) / BLOCK)
        starts = self._images[::size]
        self._shares = {self.folder / f"part_{n:03d}.npz": self._images[at:][:size] for n, at in enumerate(starts)}

    def _is_complete(self) -> bool:
        return (self.folder / "facts.json").exists()

    def bytes_to_write(self) -> int:
        """The most bytes that computing writes, including the sums that are removed at the end; 0 if it is complete."""
        if self._is_complete():
            return 0
        square = sum(width * width for width in self.file.sizes.values())
        kept = min(KEPT_FEATURES, len(self._images)) * self.file.sizes[self._main]
        return 8 * square * (len(self._shares) * HALVES + 1) + 4 * 2 * kept

    def compute_once(self, network: Network, world: World, num_workers: int) -> None:
        """Compute the statistics unless they are stored. If another run computes them, wait for it. A collective call.

        `network` maps uint8 images (B, A, height, width) to their feature arrays. `num_workers` processes of this rank
        decode images. Raises a DataError on every rank if an image cannot be read, or the cache cannot be written.
        """
        with ExitStack() as held:
            said = False
            while (state := parallel.on_main(lambda: self._state(held))) == "wait":
                if world.is_main and not said:
                    logger.info("%s: another run computes the statistics of these real images; waiting", self.folder)
                    said = True
                time.sleep(WAIT_SECONDS)
            if state == "compute":
                self._compute(network, world, num_workers)

    def _state(self, held: ExitStack) -> str:
        """One of: ready; compute (this run now holds the lock); wait (another run holds it). Called on rank 0 only."""
        with data_error(f"{self.folder}: cannot be written", REMEDY):
            if self._is_complete():
                return "ready"
            self.folder.mkdir(parents=True, exist_ok=True)
            ours = held.enter_context(exclusive_or_not(self.folder / ".lock"))
            if ours and not self._is_complete():  # it may have been completed since the first look
                return "compute"
        held.close()
        return "ready" if ours else "wait"

    def _compute(self, network: Network, world: World, num_workers: int) -> None:
        """Compute the missing shares, which ranks take in turn, one file each; then add them up.

        The shares of a killed run are used.
        """
        missing = parallel.on_main(lambda: [path for path in self._shares if not path.exists()])
        total = sum(len(self._shares[path]) for path in missing)

        def counting(images: torch.Tensor) -> FeatureArrays:
            found = network(images)
            progress.update(min(len(images) * world.size, total - progress.n))  # assumes that other ranks are as far
            return found

        def share() -> None:
            for path in missing[world.rank :: world.size]:
                try:
                    content = self._sums_over(self._shares[path], counting, num_workers)
                    with data_error(f"{self.folder}: cannot be written", REMEDY), atomic_write(path) as file:
                        np.savez(file, **content)  # type: ignore[arg-type]
                except ValueError as error:
                    if not isinstance(error, UserError):
                        error = DataError(f"{self.file.path}: unusable features of real images ({error})")
                    logger.error("rank %d: %s", world.rank, error)  # at once: other ranks may compute for hours
                    raise error from None

        description = f"real images, {self.file.name}"
        with tqdm(total=total, unit="img", desc=description, disable=not world.is_main) as progress:
            parallel.raise_together(share)
        if parallel.on_main(self._finish):
            self._compute(network, world, num_workers)

    @cached_property
    def _halves(self) -> npt.NDArray[np.int8]:
        """The half, 0 or 1, to which each image belongs, (N,)."""
        halves = np.ones(len(self._images), np.int8)
        halves[permutation(len(halves), 0, Purpose.REFERENCE_HALVES)[: len(halves) // 2]] = 0
        return halves

    @cached_property
    def _chosen(self) -> Int64Array:
        """The images whose features are kept, in their order, (M,)."""
        return permutation(len(self._images), 0, Purpose.REFERENCE_FEATURES)[:KEPT_FEATURES]

    def _sums_over(self, ids: range, network: Network, num_workers: int) -> FeatureArrays:
        """Sums of each feature array over both halves of the images `ids`; features to keep, with their places."""
        sums = self._distances_of_halves()
        places = np.flatnonzero((self._chosen >= ids.start) & (self._chosen < ids.stop))
        chosen = self._chosen[places]
        kept = np.empty((len(places), self.file.sizes[self._main]), np.float32)
        with naming_dead_workers(), closing(read_once(self._shards, ids, BLOCK, num_workers)) as images:
            blocks = (network(torch.from_numpy(block).permute(0, 3, 1, 2)) for block in images)
            for rows in (ids[first : first + ROWS] for first in range(0, len(ids), ROWS)):
                found = list(islice(blocks, ROWS // BLOCK))
                features = {name: np.concatenate([block[name] for block in found]) for name in sums}
                for name, half in product(sums, range(HALVES)):
                    sums[name].update(features[name][self._halves[rows.start : rows.stop] == half], real=half == 1)
                own = (chosen >= rows.start) & (chosen < rows.stop)
                kept[own] = features[self._main][chosen[own] - rows.start]
        content: FeatureArrays = {"places": places, "kept": kept}
        for name, sum_ in sums.items():
            content |= {f"{name}/{key}": np.asarray(value) for key, value in sum_.metric_state.items()}
        return content

    def _distances_of_halves(self) -> dict[str, FrechetDistance]:
        """A `FrechetDistance` without images for each feature array."""
        from jitscale.evaluation.metrics import FrechetDistance  # noqa: PLC0415 (slow)

        return {name: FrechetDistance(width) for name, width in self.file.sizes.items()}

    def _finish(self) -> list[Path]:
        """Add up the shares, always in the same order, and write the results.

        If shares are damaged, they are removed and returned instead, to be computed again.
        """
        from jitscale.evaluation.metrics import kernel_distance  # noqa: PLC0415 (slow)

        sums = self._distances_of_halves()
        features = np.empty((len(self._chosen), self.file.sizes[self._main]), np.float32)
        damaged = []
        for path in self._shares:
            try:
                with np.load(path) as content:
                    features[content["places"]] = content["kept"]
                    for name, sum_ in sums.items():
                        sum_.merge_state({key: torch.from_numpy(content[f"{name}/{key}"]) for key in sum_.metric_state})
            except DAMAGED:
                if self._is_complete():
                    return []  # without file locks another run may have finished first, and removed the shares
                logger.warning("%s: damaged; it is computed again", path)
                path.unlink(missing_ok=True)
                damaged.append(path)
        if damaged:
            return damaged
        arrays: FeatureArrays = {}
        for name, sum_ in sums.items():
            arrays[f"all/{name}/mean"], arrays[f"all/{name}/covariance"] = sum_.gaussian("real", "fake")
        floors = {name: float(sum_.compute()) for name, sum_ in sums.items()}
        half = len(features) // 2  # they are in a random order
        floors["kid"], floors["kid_std"] = kernel_distance(features[:half], features[half:])
        with data_error(f"{self.folder}: cannot be written", REMEDY):
            with atomic_write(self.folder / "statistics.npz") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
            with atomic_write(self.folder / "features.npy") as file:
                np.save(file, features)
            digests = {name: sha256_of(self.folder / name) for name in ("statistics.npz", "features.npy")}
            facts = {**self.identity, "images": len(self._images), "stored": self._shards.stored, "floors": floors}
            with atomic_write(self.folder / "facts.json") as file:
                file.write(json.dumps({**facts, "files": digests}, indent=1).encode())
            for path in (*self.folder.glob("part_*.npz"), *self.folder.glob(aside_pattern("part_*.npz"))):
                path.unlink(missing_ok=True)
        return []

    def read(self) -> tuple[FeatureArrays, npt.NDArray[np.float32], dict[str, Any]]:
        """Statistics, features and facts, with all hashes compared. Raises a DataError if the cache is damaged."""
        remedy = "remove the folder; the next run computes them again"
        with data_error(f"{self.folder}: statistics of the real images are damaged", remedy, DAMAGED):
            facts = json.loads((self.folder / "facts.json").read_text())
            differing = [name for name, digest in facts["files"].items() if sha256_of(self.folder / name) != digest]
            if differing:
                raise ValueError(f"{differing[0]} has changed since it was written")
            with np.load(self.folder / "statistics.npz") as content:
                statistics = dict(content)
            features = np.load(self.folder / "features.npy")
        return statistics, features, facts
