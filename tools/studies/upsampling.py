"""Are FID and Inception Score unchanged when small images are upsampled?

Glyphs drawn at 128 px, made smaller by averaging and larger again; distances to the other half of the glyphs, in units
of the distance between the halves. Nothing is trained but the feature network, which sees images of 128 px.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from jitscale.data.glyphs import Glyphs
from jitscale.evaluation.metrics import frechet_distance, inception_score
from jitscale.evaluation.networks import load_feature_network
from jitscale.evaluation.small_networks import GlyphFeatures
from jitscale.figures import COLOURS, MARKERS, curve, figure, mean_and_deviation
from studies.tasks import Experiment, Outcomes, by_seed

SIZE = GlyphFeatures.input_size
SOURCES = (16, 32, 64, 96)
KERNELS = ("nearest", "bilinear", "bicubic")
IMAGES, TOGETHER = 6000, 200


@dataclass(frozen=True)
class Resampling:
    """All sources and kernels for the glyphs of one seed.

    Attributes:
        seed: of the glyphs.
        images: how many, half of them the real ones.
    """

    seed: int
    images: int = IMAGES
    after: str | None = None

    @property
    def name(self) -> str:
        """Its folder's."""
        return f"resampled_s{self.seed}"

    def cost(self, folder: Path) -> int:
        """In images trained, about."""
        return self.images * (1 + len(SOURCES) * len(KERNELS))

    def execute(self, folder: Path) -> dict[str, Any]:
        """Distances in units of half against half, and scores, by kernel and source."""
        started = time.perf_counter()
        network = load_feature_network("glyphs", "cpu")
        glyphs = Glyphs(self.images, SIZE, seed=100 + self.seed)
        drawn = torch.from_numpy(np.stack([glyphs[index] for index in range(self.images)])).permute(0, 3, 1, 2)

        def embed(images: torch.Tensor) -> tuple[Any, Any]:
            parts = [network(part) for part in images.split(TOGETHER)]
            features, logits, _ = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
            return features, logits

        half = self.images // 2  # glyphs of all letters in both: their classes go round
        real, _ = embed(drawn[:half])
        features, logits = embed(drawn[half:])
        floor = frechet_distance(features, real)
        found: dict[str, dict[str, dict[str, float]]] = {kernel: {} for kernel in KERNELS}
        for kernel in KERNELS:
            for source in SOURCES:
                features, changed = embed(resampled(drawn[half:], source, kernel))
                found[kernel][str(source)] = {
                    "distance": frechet_distance(features, real) / floor,
                    "inception_score": inception_score(changed)[0],
                }
        return {
            "floor": floor,
            "inception_score": inception_score(logits)[0],
            "found": found,
            "training_seconds": 0.0,
            "measuring_seconds": time.perf_counter() - started,
        }


def resampled(images: torch.Tensor, source: int, kernel: str) -> torch.Tensor:
    """uint8 (N, 3, S, S) brought to `source` pixels a side by averaging over areas, and back by `kernel`."""
    parts = []
    for part in images.float().split(TOGETHER):
        small = F.interpolate(part, size=(source, source), mode="area").round()
        options = {} if kernel == "nearest" else {"align_corners": False}
        parts.append(F.interpolate(small, size=images.shape[2:], mode=kernel, **options))
    return torch.cat(parts).round().clamp(0, 255).to(torch.uint8)


def tasks(seeds: int) -> Sequence[Resampling]:
    """One a seed."""
    return [Resampling(seed) for seed in range(seeds)]


def summarise(outcomes: Outcomes) -> dict[str, Any]:
    """By kernel, source and seed."""
    seeds = by_seed(outcomes, "resampled")
    return {
        "floor": [seed["floor"] for seed in seeds],
        "inception_score": [seed["inception_score"] for seed in seeds],
        "found": {
            kernel: {
                str(source): {
                    key: [seed["found"][kernel][str(source)][key] for seed in seeds]
                    for key in ("distance", "inception_score")
                }
                for source in SOURCES
            }
            for kernel in KERNELS
        },
    }


def draw(summary: Mapping[str, Any], path: Path) -> None:
    """Distance and score over the source's size."""
    with figure(path, panels=2) as (distances, scores):
        for axis, key, name in (
            (distances, "distance", "distance / half against half"),
            (scores, "inception_score", "IS"),
        ):
            for number, kernel in enumerate(KERNELS):
                seeds = list(zip(*(summary["found"][kernel][str(s)][key] for s in SOURCES), strict=True))
                curve(axis, SOURCES, seeds, kernel, color=COLOURS[number], marker=MARKERS[number])
            axis.set(xlabel="pixels of the source", ylabel=name)
            axis.set_xticks(SOURCES)
            axis.legend()
        distances.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
        distances.set(yscale="log")
        scores.axhline(np.mean(summary["inception_score"]), color="black", linewidth=0.8, linestyle=":")


def describe(summary: Mapping[str, Any]) -> list[str]:
    """A line for each source and kernel."""
    floor = mean_and_deviation(summary["floor"])
    score = mean_and_deviation(summary["inception_score"])
    lines = [f"half against half {floor[0]:.2f} ±{floor[1]:.2f}; Inception Score {score[0]:.2f} ±{score[1]:.2f}"]
    for kernel in KERNELS:
        for source in SOURCES:
            cell = summary["found"][kernel][str(source)]
            distance, scored = mean_and_deviation(cell["distance"]), mean_and_deviation(cell["inception_score"])
            lines.append(
                f"{kernel:10}{source:4} -> {SIZE} px: distance {distance[0]:8.2f} ±{distance[1]:.2f} times that, IS "
                f"{scored[0]:.2f} ±{scored[1]:.2f}"
            )
    return lines


EXPERIMENT = Experiment(
    title="FID and Inception Score of upsampled images",
    tools=[],
    tasks=tasks,
    summarise=summarise,
    draw=draw,
    describe=describe,
)
