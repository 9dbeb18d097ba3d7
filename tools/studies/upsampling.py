"""Are FID and Inception Score unchanged when small images are upsampled?

Half of the letters, drawn at 128 px, are made smaller by averaging and larger again. Their distance to the other half
is given in units of the distance between the halves. No network is trained; the feature network sees images of 128 px.
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from jitscale.config import EvaluationConfig
from jitscale.evaluation.metrics import frechet_distance, inception_score
from jitscale.evaluation.networks import find_network
from jitscale.evaluation.small_networks import GlyphFeatures
from jitscale.figures import curve_over, figure, plus_minus
from jitscale.preparation.glyphs import Glyphs
from studies.tasks import Outcomes, Shards, Summary, Task, by_seed

SHARDS: Shards = []
SIZE = GlyphFeatures.input_size
SOURCES = (16, 32, 64, 96)
KERNELS = ("nearest", "bilinear", "bicubic")
IMAGES, TOGETHER = 6000, 200


@dataclass(frozen=True)
class Resampling(Task):
    """All sources and kernels for the glyphs of one seed; half of the `images` are the real ones."""

    seed: int
    images: int = IMAGES

    def cost(self, folder: Path) -> int:
        return self.images * (1 + len(SOURCES) * len(KERNELS))

    def execute(self, folder: Path) -> dict[str, Any]:
        """Distances in units of half against half, and scores, by kernel and source."""
        network = find_network("glyphs", EvaluationConfig()).load("cpu")
        glyphs = Glyphs(self.images, SIZE, seed=100 + self.seed)
        drawn = torch.from_numpy(np.stack([glyphs[index] for index in range(self.images)])).permute(0, 3, 1, 2)

        def embed(images: torch.Tensor) -> tuple[Any, Any]:
            parts = [network(part) for part in images.split(TOGETHER)]
            features, logits, _ = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
            return features, logits

        half = self.images // 2  # both halves hold all letters, since the classes alternate
        real, _ = embed(drawn[:half])
        features, logits = embed(drawn[half:])
        floor = frechet_distance(features, real)
        found: dict[str, dict[str, dict[str, float]]] = {kernel: {} for kernel in KERNELS}
        for kernel, source in product(KERNELS, SOURCES):
            features, changed = embed(resampled(drawn[half:], source, kernel))
            distance, score = frechet_distance(features, real) / floor, inception_score(changed)[0]
            found[kernel][str(source)] = {"distance": distance, "inception_score": score}
        return {"floor": floor, "inception_score": inception_score(logits)[0], "found": found}


def resampled(images: torch.Tensor, source: int, kernel: str) -> torch.Tensor:
    """uint8 (N, 3, S, S) brought to `source` pixels per side by averaging over areas, and back by `kernel`."""
    options = {} if kernel == "nearest" else {"align_corners": False}
    parts = images.float().split(TOGETHER)
    small = (F.interpolate(part, size=(source, source), mode="area").round() for part in parts)
    large = [F.interpolate(part, size=images.shape[2:], mode=kernel, **options) for part in small]
    return torch.cat(large).round().clamp(0, 255).to(torch.uint8)


def tasks(seed: int) -> list[Resampling]:
    """One task."""
    return [Resampling(f"resampled_s{seed}", seed)]


def summarise(outcomes: Outcomes) -> Summary:
    """By kernel, source and seed."""
    seeds = by_seed(outcomes, "resampled")
    found: dict[str, dict[str, dict[str, list[float]]]] = {kernel: {} for kernel in KERNELS}
    for kernel, source in product(KERNELS, map(str, SOURCES)):
        cells = [seed["found"][kernel][source] for seed in seeds]
        found[kernel][source] = {key: [cell[key] for cell in cells] for key in ("distance", "inception_score")}
    return {**{key: [seed[key] for seed in seeds] for key in ("floor", "inception_score")}, "found": found}


def draw(summary: Summary, path: Path) -> None:
    """Distance and score over the source's size."""
    with figure(path, panels=2) as (distances, scores):
        for axis, key in ((distances, "distance"), (scores, "inception_score")):
            for number, kernel in enumerate(KERNELS):
                curve_over(axis, {s: summary["found"][kernel][str(s)][key] for s in SOURCES}, kernel, number)
            axis.set_xlabel("pixels of the source")
            axis.set_xticks(SOURCES)
            axis.legend()
        distances.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
        distances.set(ylabel="distance / half against half", yscale="log")
        scores.set_ylabel("IS")
        scores.axhline(float(np.mean(summary["inception_score"])), color="black", linewidth=0.8, linestyle=":")


def describe(summary: Summary) -> list[str]:
    """A line for each source and kernel."""
    floor, score = plus_minus(summary["floor"]), plus_minus(summary["inception_score"])
    lines = [f"half against half {floor}; Inception Score {score}"]
    for kernel, source in product(KERNELS, SOURCES):
        cell = summary["found"][kernel][str(source)]
        distance, score = plus_minus(cell["distance"], 8), plus_minus(cell["inception_score"])
        lines.append(f"{kernel:10}{source:4} -> {SIZE} px: distance {distance} times that, IS {score}")
    return lines
