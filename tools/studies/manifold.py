"""Two-dimensional data hidden in many dimensions: the paper's toy experiment (arXiv 2511.13720, figure 2).

The data are a spiral in the plane. A fixed matrix with orthonormal columns embeds it in D dimensions. A ReLU network of
five layers of width 256 learns to denoise it. It predicts x, e or v; the loss is in v. Noise fills all D dimensions,
the data only two.

Shapes: B points.
"""

from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from jitscale.config import DiffusionConfig
from jitscale.diffusion.objective import interpolate, sample_loss, times_from_normal
from jitscale.diffusion.sampler import Sampler
from jitscale.figures import COLOURS, figure, plus_minus
from studies.tasks import Outcomes, Shards, Summary, Task, by_seed

SHARDS: Shards = []
DIMENSIONS = (2, 8, 16, 512)
SPACES = ("x", "e", "v")
WIDTH, LAYERS = 256, 5
BATCH, STEPS, LR = 512, 5000, 1e-3
SAMPLES, SHOWN = 4000, 300
NOISE = 0.02  # standard deviation of the data around the spiral
DIRECTIONS = 200


@dataclass(frozen=True)
class Toy(Task):
    """One network."""

    dimensions: int
    prediction: str  # x, e or v
    seed: int
    steps: int = STEPS
    samples: int = SAMPLES  # drawn and compared

    def cost(self, folder: Path) -> int:
        return self.steps * (2 if self.dimensions > 100 else 1)  # in 512 dimensions a step takes twice as long as in 2

    def execute(self, folder: Path) -> dict[str, Any]:
        """Train it, draw points, and compare them with the data."""
        torch.manual_seed(self.seed)
        diffusion = DiffusionConfig(prediction=self.prediction, loss="v", mu=0.0, sigma=1.0)
        plane = torch.linalg.qr(torch.randn(self.dimensions, 2)).Q  # (D, 2)
        widths = [self.dimensions + 1, *[WIDTH] * (LAYERS - 1), self.dimensions]
        layers = nn.Sequential()
        for before, after in pairwise(widths):
            layers.extend([nn.Linear(before, after), nn.ReLU()])
        layers.pop(-1)

        def network(z: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
            return as_images(layers(torch.cat([z.flatten(1), t[:, None]], 1)))

        optimizer = torch.optim.AdamW(layers.parameters(), lr=LR, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        for _ in range(self.steps):
            x = as_images(spiral(BATCH) @ plane.T)
            e, t = torch.randn_like(x), times_from_normal(torch.randn(BATCH), diffusion)
            z = interpolate(x, e, t)
            loss = sample_loss(network(z, t), x, e, z, t, diffusion).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        sampler = Sampler("heun", 50, 1.0, prediction=self.prediction)
        labels = torch.zeros(self.samples, dtype=torch.long)
        noise = as_images(torch.randn(self.samples, self.dimensions))
        drawn = sampler.sample(network, noise, labels, 0).flatten(1)
        inside = drawn @ plane  # (B, 2)
        outside = (drawn - inside @ plane.T).square().sum(1).mean().sqrt()
        return {
            "distance": sliced_distance(inside, spiral(self.samples)),
            "outside": float(outside),
            "points": shown(inside),
        }


def as_images(points: torch.Tensor) -> torch.Tensor:
    """(B, D) as images of one row, (B, 1, 1, D), for the objective and the sampler."""
    return points[:, None, None]


def shown(points: torch.Tensor) -> list[list[float]]:
    """The first `SHOWN` of the points (B, 2) for the figure, three digits each: all x, and all y."""
    return [[float(f"{value:.3g}") for value in axis] for axis in points[:SHOWN].T.tolist()]


def spiral(count: int) -> torch.Tensor:
    """Points of a spiral of one and a half turns, with a standard deviation of about 1: (B, 2)."""
    angle = 1.5 * np.pi * (1 + 2 * torch.rand(count).sqrt())
    points = torch.stack([angle * angle.cos(), angle * angle.sin()], 1) / 7.5
    return points + NOISE * torch.randn_like(points)


def sliced_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Sliced Wasserstein-2 distance between equally many points (B, 2): the root mean square over DIRECTIONS."""
    angles = torch.arange(DIRECTIONS) * (np.pi / DIRECTIONS)
    directions = torch.stack([angles.cos(), angles.sin()])
    first, second = ((points @ directions).sort(0).values for points in (a, b))
    return float((first - second).square().mean().sqrt())


def tasks(seed: int) -> list[Toy]:
    """All dimensions and predictions."""
    return [Toy(f"d{d}_{space}_s{seed}", d, space, seed) for d, space in product(DIMENSIONS, SPACES)]


def summarise(outcomes: Outcomes) -> Summary:
    """Numbers by dimensions and prediction; points of the first seed."""
    cells = {}
    for d, space in product(DIMENSIONS, SPACES):
        found = by_seed(outcomes, f"d{d}_{space}")
        numbers = {key: [outcome[key] for outcome in found] for key in ("distance", "outside")}
        cells[f"{d} {space}"] = {**numbers, "points": found[0]["points"]}
    torch.manual_seed(0)
    floor = [sliced_distance(spiral(SAMPLES), spiral(SAMPLES)) for _ in range(10)]
    return {"cells": cells, "floor": float(np.mean(floor)), "truth": shown(spiral(SHOWN))}


def draw(summary: Summary, path: Path) -> None:
    """Samples in the plane: a row for each prediction, a column for each D."""
    with figure(path, panels=len(DIMENSIONS), rows=len(SPACES), width=2.2, height=2.2) as axes:
        for axis, (space, d) in zip(axes, product(SPACES, DIMENSIONS), strict=True):
            cell = summary["cells"][f"{d} {space}"]
            for points, colour in ((summary["truth"], "#bbbbbb"), (cell["points"], COLOURS[SPACES.index(space)])):
                axis.plot(*points, ".", markersize=2, color=colour)
            axis.set(xlim=(-2.4, 2.4), ylim=(-2.4, 2.4), xticks=[], yticks=[])
            axis.set_title(f"{space}-prediction, D = {d}", fontsize=8)


def describe(summary: Summary) -> list[str]:
    """A line for each D and prediction."""
    lines = [f"distance in the plane (data against data {summary['floor']:.3f}), and RMS outside of it"]
    for name, cell in summary["cells"].items():
        d, space = name.split()
        distance, outside = (plus_minus(cell[key], 8, 3) for key in ("distance", "outside"))
        lines.append(f"D = {d:4} {space}-prediction {distance} {outside}")
    return lines
