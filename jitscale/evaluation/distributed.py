"""Evaluation over all ranks: features of generated and of real images, in block files, then the metrics.

RUN/evaluation/samples_<hash>/block_000000.npz    features (B, F), logits (B, L), spatial (B, R), labels (B,)
RUN/evaluation/reference_<hash>/block_000000.npz  features (B, F) and spatial (B, R) of real images
RUN/result.json
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from jitscale import parallel
from jitscale.config import Config, EvaluationConfig
from jitscale.evaluation.blocks import Block, compute_blocks, digest_of
from jitscale.evaluation.features import to_uint8
from jitscale.evaluation.generate import (
    NoiseAhead,
    autocast,
    configured_sampler,
    generate_by_scale,
    labels_of,
    ready_to_sample,
)
from jitscale.evaluation.metrics import (
    feature_statistics,
    frechet_distance,
    frechet_distance_from_statistics,
    inception_score,
    kernel_distance,
    label_agreement,
    precision_recall,
)
from jitscale.evaluation.networks import Embedder
from jitscale.evaluation.reference import Reference, reference_of
from jitscale.files import appearing_whole
from jitscale.keyed_random import Purpose, permutation
from jitscale.model.jit import JiT
from jitscale.parallel import World

DISTANCES = {"features": "fid", "spatial": "sfid"}  # names of the Fréchet distances; fd_<name> of further networks
MOST_NEIGHBOURS = 10_000  # images of precision and recall, of each kind: the protocol of the ADM evaluations


def evaluate_model(
    model: JiT, weights: str, config: Config, world: World, run_dir: Path, guide: JiT | None = None
) -> dict[str, Any]:
    """Measure samples of `model` and write `run_dir`/result.json; a collective call.

    Args:
        model: made by `ready_to_sample`; the same weights on every rank.
        weights: name of the weight set, for the record.
        config: sampler, feature network, reference and number of images.
        world: this rank.
        run_dir: where `evaluation/` and `result.json` go.
        guide: for autoguidance, see `Evaluator`.

    Returns:
        See `Evaluator.measure`.

    Raises:
        ConfigError: no feature network is configured, or there is no reference.
        DataError: the reference is missing or damaged.
    """
    evaluator = Evaluator(config, world, run_dir / "evaluation", guide)
    (result,) = evaluator.measure(model, weights, [config.evaluation])
    if world.is_main:
        with appearing_whole(run_dir / "result.json") as file:
            file.write(json.dumps(result, indent=2).encode())
    return result


class Evaluator:
    """A feature network and real images, with which samples are measured."""

    def __init__(self, config: Config, world: World, folder: Path, guide: JiT | None = None) -> None:
        """Load the network, and compute the features of the real images; a collective call.

        Args:
            config: feature network, reference, precision.
            world: this rank.
            folder: for the blocks.
            guide: the network of `evaluation.guide`, the same on every rank; made ready to sample.

        Raises:
            ConfigError: no feature network is configured, or there is no reference.
            DataError: the reference is missing or damaged.
        """
        self.config, self.world, self.folder = config, world, folder
        self.guide = None if guide is None else ready_to_sample(guide, config, world.device)
        self.embedder = Embedder(config.evaluation, world)
        self.reference = reference_of(self.embedder, config, world, folder)

    def measure(
        self,
        model: JiT,
        weights: str,
        settings: Sequence[EvaluationConfig],
        *,
        neighbours: bool = True,
        keep_blocks: bool = True,
    ) -> list[dict[str, Any]]:
        """The metrics of samples of `model`, for settings that differ in the guidance scale alone; a collective call.

        Args:
            model: made by `ready_to_sample`; the same weights on every rank.
            weights: name of the weight set, for the record.
            settings: how to sample, and how many images.
            neighbours: whether to compute what compares pairs of images, and takes the longest.
            keep_blocks: False removes the files of this call again, and those of one that was cut short.

        Returns:
            On every rank and for each setting: `fid`, `inception_score`, `num_images`, `protocol`, `reference`; `sfid`
            where the feature network has spatial features; `fd_<name>` of further networks; `kid`, `precision`,
            `recall`, `fid_floor` (one half of the real images against the other) with `neighbours` and where the
            features of real images are at hand, not only statistics; `label_agreement` where the feature network has
            as many classes as the model.

        Raises:
            UserError: an image with values that are not finite.
        """
        named = {"weights": weights, "weights_sha256": weights_digest(model)}
        if self.guide is not None:
            named["guide_sha256"] = weights_digest(self.guide)
        protocols = [
            {**named, **_protocol(model, self.embedder, self.config, setting, self.world.device)}
            for setting in settings
        ]
        samplers = [configured_sampler(setting, model.diffusion) for setting in settings]
        evaluation = settings[0]
        size = evaluation.block_size

        noise = NoiseAhead(evaluation.seed, model.config.image_size)

        def block(number: int, wanted: Sequence[int], following: int | None) -> Iterator[Block]:
            # Always a whole block: the batch's shape, and so its arithmetic, must not depend on the number of images.
            ids = range(number * size, (number + 1) * size)
            ahead = None if following is None else range(following * size, (following + 1) * size)
            labels = labels_of(ids, model.config.num_classes)
            with autocast(self.config, self.world.device):
                chosen = [samplers[index] for index in wanted]
                for images in generate_by_scale(model, chosen, ids, noise.of(ids, ahead), self.guide):
                    yield {**self.embedder(to_uint8(images, ids)), "labels": labels.numpy()}

        parent = self.folder if keep_blocks else self.folder / "passing"
        folders = [parent / f"samples_{digest_of(protocol)}" for protocol in protocols]
        count = -(-evaluation.num_images // size)
        found = compute_blocks(folders, count, size, block, self.world, "generate")
        results: list[dict[str, Any]] = []
        if self.reference is not None:
            for samples, protocol in zip(found, protocols, strict=True):
                first = {key: values[: evaluation.num_images] for key, values in samples.items()}
                results.append({**self._metrics(first, self.reference, model, neighbours), "protocol": protocol})
            if not keep_blocks:
                shutil.rmtree(parent)
        return parallel.broadcast_object(results)

    def _metrics(self, samples: Block, reference: Reference, model: JiT, neighbours: bool) -> dict[str, Any]:
        generated = samples["features"]
        result: dict[str, Any] = {"num_images": len(generated), "reference": reference.facts}
        for part, real in reference.statistics.items():
            name = DISTANCES.get(part, part.replace("features", "fd"))
            result[name] = frechet_distance_from_statistics(feature_statistics(samples[part]), real)
        result["inception_score"], result["inception_score_std"] = inception_score(samples["logits"])
        if neighbours and reference.features is not None:
            result |= _against_images(reference.features["features"], generated)
        if self.embedder.main.num_logits == model.config.num_classes:
            result["label_agreement"] = label_agreement(samples["logits"], samples["labels"])
        return result


def _against_images(real: npt.NDArray[Any], generated: npt.NDArray[Any]) -> dict[str, float]:
    """What takes more than the statistics of the real images."""
    half = permutation(len(real), 0, Purpose.REFERENCE_HALVES)[: len(real) // 2]
    other = np.setdiff1d(np.arange(len(real)), half)
    kernel, deviation = kernel_distance(real, generated)
    precision, recall = precision_recall(real[:MOST_NEIGHBOURS], generated[:MOST_NEIGHBOURS])
    return {
        "fid_floor": frechet_distance(real[half], real[other]),
        "num_real_images": len(real),
        "kid": kernel,
        "kid_std": deviation,
        "precision": precision,
        "recall": recall,
    }


def weights_digest(model: JiT) -> str:
    """A hash of all weights, so that an evaluation is continued only with the weights it began with."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _protocol(
    model: JiT, embedder: Embedder, config: Config, setting: EvaluationConfig, device: torch.device
) -> dict[str, Any]:
    """All that determines the generated images and their features, beside the weights.

    Not what only changes the order of sums (attention kernels, compilation, padding).
    """
    return {
        "model": asdict(model.config),
        "noise_scale": model.diffusion.noise_scale,
        "sampler": asdict(configured_sampler(setting, model.diffusion)),
        "seed": setting.seed,
        "block_size": setting.block_size,
        "precision": config.engine.precision,
        "float8": config.engine.float8,
        "device": device.type,
        **embedder.identity,
    }
