"""Real images to compare with: what is kept of shards, or statistics that others have computed.

A statistics file is an .npz with `mu` (F,) and `sigma` (F, F), as those of the authors and of ADM, `mu_s` and `sigma_s`
of spatial features as ADM's have them, and the like for further networks; what tools/make_reference.py writes also says
from how many images, by which networks and of which size.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from jitscale import parallel
from jitscale.addresses import masked
from jitscale.config import Config
from jitscale.data.shards import open_setting
from jitscale.errors import ConfigError, DataError, data_error
from jitscale.evaluation.blocks import DAMAGED
from jitscale.evaluation.networks import Embedder, NetworkFile, identity_of, sizes_of
from jitscale.evaluation.real_images import RealImages, cache_folders
from jitscale.evaluation.small_networks import TRAINED_ON
from jitscale.files import atomic_write, sha256_of
from jitscale.node import once_a_node
from jitscale.parallel import World

logger = logging.getLogger(__name__)

FEWEST_REAL_IMAGES = 4  # of which one half is compared with the other


class FeatureStatistics(NamedTuple):
    """The Gaussian that stands for a set of images: `mean` (F,) and unbiased `covariance` (F, F), float64."""

    mean: npt.NDArray[np.float64]
    covariance: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Reference:
    """What generated images are compared with."""

    statistics: dict[str, FeatureStatistics]  # of each array of `NetworkFile.sizes`; of a file, those that it has
    features: npt.NDArray[np.float32] | None  # (M, F) of the main network, of some images in a random order; if known
    floors: dict[str, float]  # distances of the real images' halves, by array, with `kid` and `kid_std`; if known
    facts: dict[str, Any]  # where it comes from, for the record


def reference_of(embedder: Embedder, config: Config, world: World, run_dir: Path) -> Reference | None:
    """The real images that `config` names, a statistics file or shards; a collective call. None on ranks other than 0.

    The cache is in `run_dir` if it can be neither next to the shards nor in `evaluation.cache_dir`. Raises a
    ConfigError if there is no reference, or too few images, and a DataError if the shards, the statistics or the cache
    cannot be read, or are of another network.
    """
    source = reference_source(config)
    kept = open_real_images(embedder.files, config, world, run_dir)
    if not kept:
        return parallel.raise_together(lambda: read_statistics(Path(source), embedder.files) if world.is_main else None)
    for number, images in enumerate(kept):
        images.compute_once(partial(embedder.arrays_of, number), world, config.data.num_workers)
    return parallel.raise_together(lambda: _combined(kept, source) if world.is_main else None)


def reference_source(config: Config) -> str:
    """`evaluation.reference`, or else `data.shards`. Raises a ConfigError if neither is set."""
    source = config.evaluation.reference or config.data.shards
    if not source:
        raise ConfigError("evaluation.reference: no real images to compare with; name shards here or in data.shards")
    return source


def open_real_images(files: Sequence[NetworkFile], config: Config, world: World, run_dir: Path) -> list[RealImages]:
    """The real images as each network sees them, none if the reference is a file of statistics; a collective call.

    Raises a ConfigError if there is no reference, it has too few images, or `evaluation.cache_dir` cannot be used, and
    a DataError on every rank if the shards cannot be opened.
    """
    source = reference_source(config)
    if source.endswith(".npz"):
        return []
    setting = "evaluation.reference" if config.evaluation.reference else "data.shards"
    size_setting = "evaluation.reference_size" if config.evaluation.reference_size else "model.image_size"
    shards = once_a_node(world, lambda: open_setting(config, setting, 0, size_setting))
    if shards.num_samples < FEWEST_REAL_IMAGES:
        fault = f"{shards.num_samples} images; each half needs two, give at least {FEWEST_REAL_IMAGES}"
        raise ConfigError(f"evaluation.reference={source}: {fault}")
    for name in {file.name for file in files} & TRAINED_ON.keys() if world.is_main else ():
        known, names = TRAINED_ON[name], shards.class_names
        if names != known and (names is not None or shards.classes not in (None, len(known))):
            what = f"this small network knows {name} only, and {setting} has other classes"
            logger.warning("%s: %s, so its numbers mean nothing; set evaluation.features=inception", name, what)
    folders = cache_folders(config, shards, run_dir, world)
    return [RealImages(file, shards, folders) for file in files]


def _combined(kept: Sequence[RealImages], source: str) -> Reference:
    """One reference of what all networks say, the main one first. Raises a DataError if the cache is damaged."""
    contents = [images.read() for images in kept]
    statistics, floors = {}, {}
    for images, (arrays, _, facts) in zip(kept, contents, strict=True):
        for name in images.file.sizes:
            statistics[name] = FeatureStatistics(arrays[f"all/{name}/mean"], arrays[f"all/{name}/covariance"])
            floors[name] = float(facts["floors"][name])
    _, features, main = contents[0]
    floors |= {name: float(main["floors"][name]) for name in ("kid", "kid_std")}
    said = {key: main[key] for key in ("manifest", "images", "image_size", "crop", "stored")}
    facts = {**said, "source": masked(source), **identity_of([images.file for images in kept])}
    return Reference(statistics, features, floors, facts)


def write_statistics(path: Path, reference: Reference) -> None:
    """Write an .npz that `read_statistics` takes, with all facts. Raises a DataError if it cannot be written."""
    arrays = {"facts": np.array(json.dumps({**reference.facts, "floors": reference.floors}))}
    for name, statistics in reference.statistics.items():
        arrays |= dict(zip(_keys(name), statistics, strict=True))
    with data_error(f"{path}: cannot be written", "choose another --output"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]


def read_statistics(path: Path, files: Sequence[NetworkFile]) -> Reference:
    """The statistics of an .npz file, of those arrays of the networks, the main one first, that it has.

    Raises a DataError if it cannot be read, is of another network, or lacks one that is asked for.
    """
    statistics, sizes = {}, sizes_of(files)
    place, remedy = f"evaluation.reference={path}", "make them with tools/make_reference.py, or name shards"
    with data_error(f"{place}: no statistics of {', '.join(sizes)}", remedy, DAMAGED), np.load(path) as content:
        for name in sizes:
            keys = _keys(name)
            if name != "spatial" or keys[0] in content:  # the authors' files are without
                statistics[name] = FeatureStatistics(*(content[key].astype(np.float64) for key in keys))
        facts: dict[str, Any] = json.loads(str(content["facts"])) if "facts" in content else {"source": path.name}
    for name, (mean, covariance) in statistics.items():
        size = sizes[name]
        if (mean.shape, covariance.shape) != ((size,), (size, size)):
            found = f"{' and '.join(_keys(name))} have the shapes {mean.shape} and {covariance.shape}"
            needed = f"the network {files[0].name} has {size} {name}; choose the one they were made with"
            raise DataError(f"{place}: {found}, {needed}")
    for key, expected in identity_of(files).items():
        if facts.get(key, expected) != expected:
            known, needed = str(facts[key])[:40], f"evaluation.features={files[0].name} has {str(expected)[:40]}"
            raise DataError(f"{place}: made with {key}={known}, {needed}; make it again")
    floors: dict[str, float] = facts.pop("floors", {})
    return Reference(statistics, None, floors, {**facts, "file_sha256": sha256_of(path)})


def _keys(name: str) -> tuple[str, str]:
    """Of mean and covariance in a file: ADM's where ADM has any."""
    suffix = {"features": "", "spatial": "_s"}.get(name, name.removeprefix("features"))
    return f"mu{suffix}", f"sigma{suffix}"
