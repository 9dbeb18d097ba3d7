"""The reference of an evaluation: real images in shards, or a file of statistics that others have computed."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jitscale import parallel
from jitscale.addresses import masked
from jitscale.config import Config
from jitscale.data.shards import open_setting
from jitscale.errors import ConfigError
from jitscale.evaluation.networks import Embedder, NetworkFile, identity_of
from jitscale.evaluation.real_images import RealImages, cache_folders
from jitscale.evaluation.statistics_file import FeatureStatistics, is_statistics, read_statistics
from jitscale.node import once_a_node
from jitscale.parallel import World

FEWEST_REAL_IMAGES = 4  # one half is compared with the other, and a half needs two


@dataclass(frozen=True)
class Reference:
    """The real images with which generated images are compared."""

    statistics: dict[str, FeatureStatistics]  # key: an array of `NetworkFile.sizes`; a file may lack some
    features: npt.NDArray[np.float32] | None  # (M, F), of the main network for some images in random order; if known
    floors: dict[str, float]  # distances between halves of the real images, by array, `kid` and `kid_std`; if known
    facts: dict[str, Any]  # the origin, for the record


def reference_of(embedder: Embedder, config: Config, world: World, run_dir: Path) -> Reference | None:
    """The reference of `config`, from a statistics file or shards; None on ranks other than 0. A collective call.

    The cache is in `evaluation.cache_dir`, or else next to the shards, or else in `run_dir`. Raises a ConfigError if
    there is no reference, or if it has too few images. Raises a DataError if the shards, the statistics or the cache
    cannot be read, or belong to another network.
    """
    source = reference_source(config)
    kept = open_real_images(embedder.files, config, world, run_dir)
    if not kept:
        return parallel.raise_together(lambda: _of_file(source, config, embedder.files) if world.is_main else None)
    for number, images in enumerate(kept):
        images.compute_once(partial(embedder.arrays_of, number), world, config.data.num_workers)
    return parallel.raise_together(lambda: _combined(kept, source) if world.is_main else None)


def reference_source(config: Config) -> str:
    """`evaluation.reference`, or else `data.shards`. Raises a ConfigError if neither is set."""
    source = config.evaluation.reference or config.data.shards
    if not source:
        raise ConfigError("evaluation.reference: there are no real images; name shards here or in data.shards")
    return source


def reference_setting(config: Config) -> tuple[str, int, str]:
    """The arguments with which `open_setting` opens the shards of `reference_source`; labels are not checked."""
    setting = "evaluation.reference" if config.evaluation.reference else "data.shards"
    return setting, 0, "evaluation.reference_size" if config.evaluation.reference_size else "model.image_size"


def open_real_images(files: Sequence[NetworkFile], config: Config, world: World, run_dir: Path) -> list[RealImages]:
    """The real images for each network; an empty list if the reference is a file of statistics. A collective call.

    Raises a ConfigError if there is no reference, it has too few images, or `evaluation.cache_dir` cannot be used, and
    a DataError on every rank if the shards cannot be opened.
    """
    source = reference_source(config)
    if is_statistics(source):
        return []
    shards = once_a_node(world, lambda: open_setting(config, *reference_setting(config)))
    if shards.num_samples < FEWEST_REAL_IMAGES:
        fault = f"has {shards.num_samples} images; give at least {FEWEST_REAL_IMAGES}"
        raise ConfigError(f"evaluation.reference={source}: {fault}")
    folders = cache_folders(config, shards, run_dir, world)
    return [RealImages(file, shards, folders) for file in files]


def _of_file(source: str, config: Config, files: Sequence[NetworkFile]) -> Reference:
    statistics, floors, facts = read_statistics(source, files, config.model.in_channels)
    return Reference(statistics, None, floors, facts)


def _combined(kept: Sequence[RealImages], source: str) -> Reference:
    """One reference from the statistics of all networks, the main one first. Raises a DataError if one is damaged."""
    contents = [images.read() for images in kept]
    statistics, floors = {}, {}
    for images, (arrays, _, facts) in zip(kept, contents, strict=True):
        for name in images.file.sizes:
            statistics[name] = FeatureStatistics(arrays[f"all/{name}/mean"], arrays[f"all/{name}/covariance"])
            floors[name] = float(facts["floors"][name])
    _, features, main = contents[0]
    floors |= {name: float(main["floors"][name]) for name in ("kid", "kid_std")}
    known = ("manifest", "images", "image_size", "channels", "crop", "stored")
    said: dict[str, Any] = {key: main[key] for key in known if key in main}
    facts = {**said, "source": masked(source), **identity_of([images.file for images in kept])}
    return Reference(statistics, features, floors, facts)
