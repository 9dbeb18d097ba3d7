"""Measures samples of a network on all ranks: features in block files, then metrics.

RUN/evaluation/samples_<hash>/block_000000.npz    features (B, F), logits (B, L), spatial (B, R), labels (B,)
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from jitscale import parallel
from jitscale.config import Config, image_shape
from jitscale.data.shards import open_setting
from jitscale.errors import ConfigError
from jitscale.evaluation import generate
from jitscale.evaluation.blocks import FeatureArrays, Missing, compute_blocks, digest_of
from jitscale.evaluation.features import to_uint8
from jitscale.evaluation.networks import Embedder, identity_of
from jitscale.evaluation.reference import Reference, reference_of
from jitscale.evaluation.statistics_file import is_statistics
from jitscale.evaluation.sweep import SweepPoint
from jitscale.model.jit import JiT
from jitscale.node import once_a_node
from jitscale.parallel import World

if TYPE_CHECKING:
    from jitscale.evaluation.metrics import FrechetDistance

MOST_NEIGHBOURS = 10_000  # real and generated images for precision and recall: the protocol of the ADM evaluations


class Evaluator:
    """Measures samples with feature networks, against real images."""

    def __init__(
        self,
        config: Config,
        world: World,
        run_dir: Path,
        guide: JiT | None = None,
        stop: Callable[[], None] = lambda: None,
    ) -> None:
        """Load the networks, and load or compute the statistics of the real images; a collective call.

        `stop` is called in every block of images, and may raise a UserError to end the work. Blocks are written to
        `evaluation` in `run_dir`. `guide`, the network of `evaluation.guide` on this rank's device, is made ready to
        sample, and kept as long as the evaluator; `guided_by` takes a guide for a while. Raises a ConfigError without a
        feature network or a reference, a DataError if one is missing or damaged.
        """
        self.config, self.world, self.folder = config, world, run_dir / "evaluation"
        self.guide: JiT | None = None
        self._guide_digest: dict[str, str] = {}
        self._set_guide(guide)
        self.embedder = Embedder(config.evaluation, world, stop)
        self.reference = reference_of(self.embedder, config, world, run_dir)
        self._distances: dict[str, FrechetDistance] = {}
        self._labels, self._labels_identity = once_a_node(world, lambda: configured_labels(config))

    @contextmanager
    def guided_by(self, guide: JiT | None) -> Iterator[None]:
        """Sample with `guide`, on this rank's device, in the body of the `with` statement only; a collective call."""
        try:
            self._set_guide(guide)
            yield
        finally:
            self.guide = None

    def _set_guide(self, guide: JiT | None) -> None:
        if guide is not None:
            generate.ready_on_all_ranks(guide, self.config, self.world)
        self.guide = guide
        self._guide_digest = {} if guide is None else {"guide_sha256": weights_digest(guide)}

    def measure(
        self, model: JiT, points: Sequence[SweepPoint], *, neighbours: bool = True, keep_blocks: bool = True
    ) -> list[dict[str, Any]]:
        """The metrics of samples of `model`, for points that differ only in the guidance scale; a collective call.

        `model` comes from `ready_on_all_ranks`, with the same weights on every rank. `points` say how to sample, and
        how many images; their weight set is only recorded. With `neighbours`, metrics that compare pairs of images are
        computed too; they take the longest. Without `keep_blocks`, no files are written; this is for few images.

        Returns on every rank, for each point:
        - `num_images`, `protocol`, `reference`
        - `fid` and `inception_score`; or only `fd_<name>` if the feature network has no logits
        - `sfid` if the network has spatial features; `fd_<name>` for further networks
        - `kid` (or `kd_<name>`), `precision` and `recall`, with `neighbours` and if features of real images are known,
          not only their statistics
        - `<distance>_floor` for each distance, between two halves of the real images, if known
        - `label_agreement` if the feature network has the model's number of classes

        `tracking.distance_of` names the distance by which settings are compared. Raises a UserError at images with
        values that are not finite.
        """
        samplers = [generate.configured_sampler(point, model.diffusion) for point in points]
        evaluation, size = points[0], points[0].block_size
        # Everything that determines the generated images and their features, except for choices that only change the
        # order of sums (attention kernels, compilation, padding).
        same = {
            "weights": evaluation.weights,
            "weights_sha256": weights_digest(model),
            **self._guide_digest,
            **self._labels_identity,
            "model": asdict(model.config),
            "noise_scale": model.diffusion.noise_scale,
            "seed": evaluation.seed,
            "block_size": size,
            "precision": self.config.engine.precision,
            "float8": self.config.engine.float8,
            "device": self.world.device.type,
            **identity_of(self.embedder.files),
        }
        protocols = [{**same, "sampler": asdict(sampler)} for sampler in samplers]

        def blocks(missing: Sequence[Missing]) -> Iterator[FeatureArrays]:
            # Always a whole block, so that the batch's shape, and with it the arithmetic, does not depend on the number
            # of images.
            ids_of_blocks = [range(block.number * size, (block.number + 1) * size) for block in missing]
            noises = generate.noise_ahead(evaluation.seed, ids_of_blocks, image_shape(model.config))
            for block, ids, noise in zip(missing, ids_of_blocks, noises, strict=True):
                labels, chosen = self._labels(ids), [samplers[index] for index in block.points]
                with generate.autocast(self.config, self.world.device):
                    for images in generate.generate_by_scale(model, chosen, labels, noise, self.guide):
                        yield {**self.embedder(to_uint8(images, ids)), "labels": labels.numpy()}

        folders = [self.folder / f"samples_{digest_of(protocol)}" for protocol in protocols]
        count = -(-evaluation.num_images // size)
        found = compute_blocks(folders, count, size, blocks, self.world, keep=keep_blocks)
        results: list[dict[str, Any]] = []
        if self.reference is not None:
            for samples, protocol in zip(found, protocols, strict=True):
                first = {key: values[: evaluation.num_images] for key, values in samples.items()}
                results.append({**self._metrics(first, self.reference, model, neighbours), "protocol": protocol})
        return parallel.broadcast_object(results)

    def _metrics(self, samples: FeatureArrays, reference: Reference, model: JiT, neighbours: bool) -> dict[str, Any]:
        from jitscale.evaluation import metrics  # noqa: PLC0415 (slow)

        generated = samples["features"]
        result: dict[str, Any] = {"num_images": len(generated), "reference": reference.facts}
        names = {array: name for file in self.embedder.files for array, name in file.distances.items()}
        for array, statistics in reference.statistics.items():
            name = names[array]
            if array not in self._distances:
                self._distances[array] = metrics.FrechetDistance.from_statistics(*statistics)
            distance = self._distances[array]
            distance.reset()
            distance.update(samples[array], real=False)
            result[name] = float(distance.compute())
            if array in reference.floors:
                result[f"{name}_floor"] = reference.floors[array]
        if "images" in reference.facts:
            result["num_real_images"] = reference.facts["images"]
        if "logits" in samples:
            result["inception_score"], result["inception_score_std"] = metrics.inception_score(samples["logits"])
        if neighbours and reference.features is not None:
            real = reference.features  # in a random order, so that the first ones are a random choice
            kernel = "kid" if names["features"] == "fid" else names["features"].replace("fd_", "kd_")
            result[kernel], result[f"{kernel}_std"] = metrics.kernel_distance(real, generated)
            found = metrics.precision_recall(real[:MOST_NEIGHBOURS], generated[:MOST_NEIGHBOURS])
            result["precision"], result["recall"] = found
            result[f"{kernel}_floor"] = reference.floors["kid"]
        if "logits" in samples and samples["logits"].shape[1] == model.config.num_classes:
            result["label_agreement"] = metrics.label_agreement(samples["logits"], samples["labels"])
        return result


def configured_labels(config: Config) -> tuple[Callable[[Sequence[int]], torch.Tensor], dict[str, Any]]:
    """A function from image ids to classes, according to `evaluation.labels`, and the protocol's entries about it.

    Raises a ConfigError if the data's frequencies are requested without shards, a DataError if labels are unknown.
    """
    classes, kind, seed = config.model.num_classes, config.evaluation.labels, config.evaluation.seed
    if kind == "balanced" or classes == 0:
        return partial(generate.labels_of, num_classes=classes), {"labels": "balanced" if classes else None}
    if kind == "random":
        return partial(generate.random_labels, seed=seed, counts=[1] * classes), {"labels": kind}
    setting = "data.shards" if config.data.shards else "evaluation.reference"
    source = config.data.shards or config.evaluation.reference or ""
    if not source or is_statistics(source):
        raise ConfigError("evaluation.labels=data: needs shards, to count their labels; set data.shards")
    counts = open_setting(config, setting, classes).class_counts()
    identity = {"labels": kind, "class_counts": digest_of({"counts": counts})}
    return partial(generate.random_labels, seed=seed, counts=counts), identity


def weights_digest(model: JiT) -> str:
    """A hash of all weights, so that an evaluation is continued only with the same weights.

    A collective call. Only rank 0 copies its weights to the CPU, tensor by tensor; the other ranks have the same ones.
    """

    def computed() -> str:
        digest = hashlib.sha256()
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy())
        return digest.hexdigest()

    return parallel.on_main(computed)
