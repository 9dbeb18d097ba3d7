"""Real images to compare with: their features, computed from shards, or statistics that others have computed.

A statistics file is an .npz with `mu` (F,) and `sigma` (F, F), as those of the authors and of ADM; what
tools/make_reference.py writes also says from how many images, by which network and of which size.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from jitscale import parallel
from jitscale.config import Config
from jitscale.data.shards import open_reference
from jitscale.errors import ConfigError, DataError
from jitscale.evaluation.blocks import Block, compute_blocks, digest_of
from jitscale.evaluation.features import FeatureNetwork
from jitscale.evaluation.metrics import FeatureStatistics, feature_statistics
from jitscale.files import appearing_whole
from jitscale.parallel import World

FEWEST_REAL_IMAGES = 4  # of which one half is compared with the other


@dataclass(frozen=True)
class Reference:
    """What generated images are compared with.

    Attributes:
        statistics: mean and covariance.
        features: (N, F), where they are known.
        facts: where it comes from, for the record.
    """

    statistics: FeatureStatistics
    features: npt.NDArray[Any] | None
    facts: dict[str, Any]


def reference_of(network: FeatureNetwork, config: Config, world: World, folder: Path) -> Reference | None:
    """The real images that `config` names; a collective call. None on ranks other than 0.

    Args:
        network: gives the features.
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
        found = parallel.together(lambda: read_statistics(Path(source), network))
        return found if world.is_main else None
    shards = parallel.together(lambda: open_reference(config))
    if shards.num_samples < FEWEST_REAL_IMAGES:
        raise ConfigError(
            f"evaluation.reference={source}: {shards.num_samples} images; each half needs two, give at least "
            f"{FEWEST_REAL_IMAGES}"
        )
    size = config.evaluation.block_size

    def block(number: int, _: Sequence[int]) -> list[Block]:
        positions = range(number * size, min((number + 1) * size, shards.num_samples))
        images = np.stack([shards.read(*shards.shard_and_index(p))[0] for p in positions])
        features, _ = network(torch.from_numpy(images).permute(0, 3, 1, 2).to(world.device))
        return [{"features": features.cpu().numpy()}]

    identity = {
        "manifest": shards.manifest_hash,
        "image_size": shards.image_size,
        "block_size": size,
        "features_sha256": network.weights_sha256,
    }
    count = -(-shards.num_samples // size)
    blocks = folder / f"reference_{digest_of(identity)}"
    (features,) = compute_blocks([blocks], count, size, block, world, "reference")
    if not world.is_main:
        return None
    real = features["features"]
    facts = {**identity, "features": network.name, "images": len(real), "source": source}
    return Reference(feature_statistics(real), real, facts)


def write_statistics(path: Path, reference: Reference) -> None:
    """Write the statistics and where they come from as an .npz that `read_statistics` takes.

    Raises:
        DataError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with appearing_whole(path) as file:
            np.savez(
                file,
                mu=reference.statistics.mean,
                sigma=reference.statistics.covariance,
                facts=np.array(json.dumps(reference.facts)),
            )
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error}); choose another --output") from error


def read_statistics(path: Path, network: FeatureNetwork) -> Reference:
    """`mu` and `sigma` of a statistics file.

    Raises:
        DataError: it cannot be read, or is of another network than `network`.
    """
    try:
        with np.load(path, allow_pickle=False) as content:
            mean, covariance = content["mu"].astype(np.float64), content["sigma"].astype(np.float64)
            facts = json.loads(str(content["facts"])) if "facts" in content else {"source": path.name}
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"evaluation.reference={path}: no statistics with mu and sigma ({error}); make them with "
            "tools/make_reference.py, or name shards"
        ) from error
    shapes = mean.shape, covariance.shape
    if shapes != ((network.num_features,), (network.num_features, network.num_features)):
        raise DataError(
            f"evaluation.reference={path}: mu and sigma have the shapes {shapes[0]} and {shapes[1]}, the network "
            f"{network.name} has {network.num_features} features; choose the one they were made with"
        )
    made_with = facts.get("features_sha256", network.weights_sha256)
    if made_with != network.weights_sha256:
        raise DataError(
            f"evaluation.reference={path}: made with weights {made_with[:8]} of {facts.get('features')}, "
            f"evaluation.features={network.name} has {network.weights_sha256[:8]}; make it again"
        )
    return Reference(FeatureStatistics(mean, covariance), None, facts)
