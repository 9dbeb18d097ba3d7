"""Real images to compare with: their features, computed from shards, or statistics that others have computed.

A statistics file is an .npz with `mu` (F,) and `sigma` (F, F), as those of the authors and of ADM, `mu_s` and `sigma_s`
of spatial features as ADM's have them, and the like for further networks; what tools/make_reference.py writes also says
from how many images, by which networks and of which size.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jitscale import parallel
from jitscale.config import Config
from jitscale.data.shards import open_reference
from jitscale.errors import ConfigError, DataError
from jitscale.evaluation.blocks import Block, compute_blocks, digest_of
from jitscale.evaluation.metrics import FeatureStatistics, feature_statistics
from jitscale.evaluation.networks import Embedder
from jitscale.files import appearing_whole
from jitscale.parallel import World

FEWEST_REAL_IMAGES = 4  # of which one half is compared with the other


@dataclass(frozen=True)
class Reference:
    """What generated images are compared with.

    Attributes:
        statistics: mean and covariance of each part of `Embedder.sizes`; of a file, of those that it has.
        features: (N, F) of each part, where they are known.
        facts: where it comes from, for the record.
    """

    statistics: dict[str, FeatureStatistics]
    features: Block | None
    facts: dict[str, Any]


def reference_of(embedder: Embedder, config: Config, world: World, folder: Path) -> Reference | None:
    """The real images that `config` names; a collective call. None on ranks other than 0.

    Args:
        embedder: gives the features.
        config: `evaluation.reference`, a statistics file or shards, or else `data.shards`.
        world: this rank.
        folder: for the blocks of features.

    Raises:
        ConfigError: there is no reference, or too few images.
        DataError: the shards or the statistics cannot be read, or are of another network.
    """
    source = config.evaluation.reference or config.data.shards
    if not source:
        raise ConfigError("evaluation.reference: no real images to compare with; name shards here or in data.shards")
    if source.endswith(".npz"):
        found = parallel.together(lambda: read_statistics(Path(source), embedder))
        return found if world.is_main else None
    shards = parallel.together(lambda: open_reference(config))
    if shards.num_samples < FEWEST_REAL_IMAGES:
        raise ConfigError(
            f"evaluation.reference={source}: {shards.num_samples} images; each half needs two, give at least "
            f"{FEWEST_REAL_IMAGES}"
        )
    size = config.evaluation.block_size

    def block(number: int, _: Sequence[int], following: int | None) -> list[Block]:
        positions = range(number * size, min((number + 1) * size, shards.num_samples))
        images = np.stack([shards.read(*shards.shard_and_index(p))[0] for p in positions])
        embedded = embedder(torch.from_numpy(images).permute(0, 3, 1, 2))
        return [{part: embedded[part] for part in embedder.sizes}]

    identity = {
        "manifest": shards.manifest_hash,
        "image_size": shards.image_size,
        "block_size": size,
        **embedder.identity,
    }
    count = -(-shards.num_samples // size)
    blocks = folder / f"reference_{digest_of(identity)}"
    (real,) = compute_blocks([blocks], count, size, block, world, "reference")
    if not world.is_main:
        return None
    facts = {**identity, "images": len(real["features"]), "source": source}
    return Reference({part: feature_statistics(values) for part, values in real.items()}, real, facts)


def write_statistics(path: Path, reference: Reference) -> None:
    """Write the statistics and where they come from as an .npz that `read_statistics` takes.

    Raises:
        DataError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {"facts": np.array(json.dumps(reference.facts))}
        for part, statistics in reference.statistics.items():
            arrays |= dict(zip(_names(part), (statistics.mean, statistics.covariance), strict=True))
        with appearing_whole(path) as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error}); choose another --output") from error


def read_statistics(path: Path, embedder: Embedder) -> Reference:
    """The statistics of a file, of those parts of `embedder` that it has.

    Raises:
        DataError: it cannot be read, is of another network, or lacks one that is asked for.
    """
    statistics = {}
    try:
        with np.load(path, allow_pickle=False) as content:
            for part in embedder.sizes:
                mean, covariance = _names(part)
                if part != "spatial" or mean in content:  # the authors' files are without
                    statistics[part] = FeatureStatistics(
                        content[mean].astype(np.float64), content[covariance].astype(np.float64)
                    )
            facts = json.loads(str(content["facts"])) if "facts" in content else {"source": path.name}
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"evaluation.reference={path}: no statistics with {' and '.join(_names('features'))} ({error}); make them "
            "with tools/make_reference.py, or name shards"
        ) from error
    for part, found in statistics.items():
        size = embedder.sizes[part]
        if (found.mean.shape, found.covariance.shape) != ((size,), (size, size)):
            names = _names(part)
            raise DataError(
                f"evaluation.reference={path}: {names[0]} and {names[1]} have the shapes {found.mean.shape} and "
                f"{found.covariance.shape}, the network {embedder.main.name} has {size} {part}; choose the one they "
                "were made with"
            )
    for key, expected in embedder.identity.items():
        if facts.get(key, expected) != expected:
            raise DataError(
                f"evaluation.reference={path}: made with {key}={_short(facts[key])}, evaluation.features="
                f"{embedder.main.name} has {_short(expected)}; make it again"
            )
    return Reference(statistics, None, facts)


def _names(part: str) -> tuple[str, str]:
    """Of mean and covariance in a file: ADM's where ADM has any."""
    suffix = {"features": "", "spatial": "_s"}.get(part, part.removeprefix("features"))
    return f"mu{suffix}", f"sigma{suffix}"


def _short(identity: Any) -> str:
    return str(identity)[:40]
