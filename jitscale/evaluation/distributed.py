"""Evaluation over all ranks: features of generated and of real images, in block files, then the metrics.

Every block of images has its own file in a folder named by a hash of all that determines it, written atomically.
Ranks take blocks by turns and never wait for each other while they generate, any number of ranks may continue what
others began, and the result depends on neither.

    RUN/evaluation/samples_<hash>/block_000000.npz    features (B, F), logits (B, L), labels (B,)
    RUN/evaluation/reference_<hash>/block_000000.npz  features (B, F) of real images
    RUN/result.json
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from jitscale import parallel
from jitscale.config import Config
from jitscale.data.shards import open_reference
from jitscale.errors import ConfigError
from jitscale.evaluation.features import FeatureNetwork, to_uint8
from jitscale.evaluation.generate import configured_sampler, generate, labels_of
from jitscale.evaluation.metrics import (
    frechet_distance,
    inception_score,
    kernel_distance,
    label_agreement,
    precision_recall,
)
from jitscale.evaluation.networks import load_feature_network, prepare_weights
from jitscale.files import appearing_whole
from jitscale.keyed_random import Purpose, permutation
from jitscale.model.jit import JiT
from jitscale.parallel import World

MOST_NEIGHBOURS = 10_000  # images of precision and recall, of each kind: the protocol of the ADM evaluations
FEWEST_REAL_IMAGES = 4  # of which one half is compared with the other

Block = dict[str, npt.NDArray[Any]]


def evaluate_model(model: JiT, weights: str, config: Config, world: World, run_dir: Path) -> dict[str, Any]:
    """FID, IS, KID, precision and recall for samples of `model`; a collective call.

    Args:
        model: on this rank's device, in eval mode; the same weights on every rank.
        weights: name of the weight set, for the record.
        config: sampler, feature network, reference and number of images.
        world: this rank.
        run_dir: where `evaluation/` and `result.json` go.

    Returns:
        What `result.json` holds, on every rank: `fid`, `inception_score`, `kid`, `precision`, `recall`, `num_images`,
        `fid_floor` (one half of the real images against the other), `label_agreement` where the feature network knows
        the classes, `protocol`.

    Raises:
        ConfigError: no feature network is configured, or there is no reference.
        DataError: the reference shards are missing or damaged.
    """
    evaluation = config.evaluation
    features = evaluation.features
    if features is None:
        raise ConfigError("evaluation.features is null, so there is nothing to measure with; set it, such as digits")
    prepare_weights(evaluation, world)
    network = parallel.together(lambda: load_feature_network(features, world.device, evaluation))
    folder = run_dir / "evaluation"
    real = _real_features(network, config, world, folder)
    protocol = _protocol(model, weights, network, config)
    samples = _sample_features(model, network, config, world, folder / f"samples_{_digest(protocol)}")
    result: dict[str, Any] = {}
    if world.is_main:
        half = permutation(len(real), 0, Purpose.REFERENCE_HALVES)[: len(real) // 2]
        other = np.setdiff1d(np.arange(len(real)), half)
        score, deviation = inception_score(samples["logits"])
        result = {
            "fid": frechet_distance(samples["features"], real),
            "inception_score": score,
            "inception_score_std": deviation,
            "fid_floor": frechet_distance(real[half], real[other]),
            **_of_neighbours(real, samples["features"]),
            "num_images": len(samples["features"]),
            "num_real_images": len(real),
            "protocol": protocol,
        }
        if network.num_logits == model.config.num_classes:
            result["label_agreement"] = label_agreement(samples["logits"], samples["labels"])
        with appearing_whole(run_dir / "result.json") as file:
            file.write(json.dumps(result, indent=2).encode())
    return parallel.broadcast_object(result)


def _of_neighbours(real: npt.NDArray[Any], generated: npt.NDArray[Any]) -> dict[str, float]:
    kernel, deviation = kernel_distance(real, generated)
    precision, recall = precision_recall(real[:MOST_NEIGHBOURS], generated[:MOST_NEIGHBOURS])
    return {"kid": kernel, "kid_std": deviation, "precision": precision, "recall": recall}


def autocast(config: Config, device: torch.device) -> torch.autocast:
    """The arithmetic that the network was trained in, for sampling from it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.engine.precision != "fp32")


def weights_digest(model: JiT) -> str:
    """A hash of all weights, so that an evaluation is continued only with the weights it began with."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _protocol(model: JiT, weights: str, network: FeatureNetwork, config: Config) -> dict[str, Any]:
    """All that determines the generated images and their features."""
    return {
        "weights": weights,
        "weights_sha256": weights_digest(model),
        "model": asdict(model.config),
        "noise_scale": model.diffusion.noise_scale,
        "sampler": asdict(configured_sampler(config.evaluation, model.diffusion)),
        "seed": config.evaluation.seed,
        "block_size": config.evaluation.block_size,
        "precision": config.engine.precision,
        "features": network.name,
        "features_sha256": network.weights_sha256,
    }


def _sample_features(model: JiT, network: FeatureNetwork, config: Config, world: World, folder: Path) -> Block:
    evaluation, num_classes = config.evaluation, model.config.num_classes
    sampler, size = configured_sampler(evaluation, model.diffusion), evaluation.block_size

    def block(number: int) -> Block:
        # Always a whole block: the batch's shape, and so its arithmetic, must not depend on the number of images.
        ids = range(number * size, (number + 1) * size)
        with autocast(config, world.device):
            images = generate(model, sampler, ids, evaluation.seed)
        features, logits = network(to_uint8(images))
        labels = labels_of(ids, num_classes)
        return {"features": features.cpu().numpy(), "logits": logits.cpu().numpy(), "labels": labels.numpy()}

    samples = _blocks(folder, -(-evaluation.num_images // size), size, block, world, "generate")
    return {key: values[: evaluation.num_images] for key, values in samples.items()}


def _real_features(network: FeatureNetwork, config: Config, world: World, folder: Path) -> npt.NDArray[Any]:
    source = config.evaluation.reference or config.data.shards
    if not source:
        raise ConfigError("evaluation.reference: no real images to compare with; name shards here or in data.shards")
    shards = parallel.together(lambda: open_reference(config))
    if shards.num_samples < FEWEST_REAL_IMAGES:
        raise ConfigError(
            f"evaluation.reference={source}: {shards.num_samples} images; each half needs two, give at least "
            f"{FEWEST_REAL_IMAGES}"
        )
    size = config.evaluation.block_size

    def block(number: int) -> Block:
        positions = range(number * size, min((number + 1) * size, shards.num_samples))
        images = np.stack([shards.read(*shards.shard_and_index(p))[0] for p in positions])
        features, _ = network(torch.from_numpy(images).permute(0, 3, 1, 2).to(world.device))
        return {"features": features.cpu().numpy()}

    identity = {
        "manifest": shards.manifest_hash,
        "image_size": shards.image_size,
        "block_size": size,
        "features_sha256": network.weights_sha256,
    }
    count = -(-shards.num_samples // size)
    return _blocks(folder / f"reference_{_digest(identity)}", count, size, block, world, "reference")["features"]


def _blocks(
    folder: Path, count: int, size: int, compute: Callable[[int], Block], world: World, description: str
) -> Block:
    """Compute the blocks that are not on disk yet, by turns; then all of them, concatenated, on rank 0."""
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


def _digest(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
