"""Euler, Heun and two multistep methods: distance and error over evaluations of the network.

For each seed, one network for the digits and one for letters at 64 px. The error compares samples, in [-1, 1], with
those of 1,000 steps from the same noise: the root mean square of the difference over all numbers of some images.
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from jitscale import parallel
from jitscale.config import Config
from jitscale.evaluation.generate import generate
from jitscale.figures import curve_over, figure, plus_minus
from studies.run import seeded
from studies.tasks import Outcomes, Shards, Summary, Task, difference, ends
from studies.ways import Measured, Ways, of_ways, sampler_of

SHARDS: Shards = [("digits", 32), ("glyphs", 64)]
METHODS = ("euler", "heun", "2m", "ab2")
EVALUATIONS = (11, 21, 31, 51, 99)  # odd, so that Heun's method can use all of them; the paper uses Heun with 99
PAPER = EVALUATIONS[-1]  # of the paper's sampler
SCALE, GUIDED = 1.5, (11, 51)  # guidance doubles each evaluation, so fewer numbers are measured
SHIFTS, SHIFTED = (0.5, 2.0), 21  # time shifts besides 1, all at so many evaluations
EXACT = ("evaluation.method=ab2", "evaluation.steps=1000", "evaluation.time_shift=1.0")
ALIKE = 0.05  # a loss that nobody would notice, as a share of the distance of the paper's sampler
# Configuration, images seen, and samples of a distance and of an error; letters cost six times as much as digits.
DATA = {"digits": ("digits_32.yaml", 128_000, 512, 100), "glyphs": ("glyphs_64.yaml", 64_000, 256, 40)}


@dataclass(frozen=True)
class Errors(Ways):
    """Measures how far all ways are from the exact solutions."""

    images: int

    def cost(self, folder: Path) -> int:
        # The exact solutions take about twice as long as all the ways.
        return 1 + 3 * super().cost(folder) * self.images // self.run.load(folder).evaluation.num_images

    def execute(self, folder: Path) -> dict[str, Any]:
        """The error by the name of the way."""
        network = self.network(folder, parallel.start(parallel.choose_device("cpu")))

        def drawn(config: Config) -> torch.Tensor:
            return generate(network, sampler_of(config), range(self.images), config.evaluation.seed)

        exact: dict[float, torch.Tensor] = {}  # by the guidance scale
        found = {}
        for name, config in self.configs(folder).items():
            scale = config.evaluation.guidance_scale
            if scale not in exact:
                exact[scale] = drawn(self.run.load(folder, *self.ways[name], *EXACT))
            found[name] = {"error": float((drawn(config) - exact[scale]).square().mean().sqrt())}
        return {"ways": found}


def evaluations_of(method: str, scale: float) -> tuple[int, ...]:
    """The numbers of evaluations at which a method is measured."""
    if scale == 1.0:
        return EVALUATIONS
    return (*GUIDED, PAPER) if method == "heun" else GUIDED


def way(method: str, evaluations: int, scale: float = 1.0, shift: float = 1.0) -> str:
    """The name of a way of sampling."""
    return f"{method} {evaluations} {scale:g} {shift:g}"


def ways() -> dict[str, tuple[str, ...]]:
    """All ways of sampling, with their settings."""
    chosen = [(m, n, scale, 1.0) for m, scale in product(METHODS, (1.0, SCALE)) for n in evaluations_of(m, scale)]
    chosen += product(METHODS, (SHIFTED,), (1.0,), SHIFTS)
    return {
        way(method, evaluations, scale, shift): (
            f"evaluation.method={method}",
            f"evaluation.steps={(evaluations + 1) // 2 if method == 'heun' else evaluations}",
            f"evaluation.guidance_scale={scale}",
            f"evaluation.time_shift={shift}",
        )
        for method, evaluations, scale, shift in chosen
    }


def tasks(seed: int) -> list[Task]:
    """A training for each data set, and two tasks for its network."""
    found: list[Task] = []
    for data, (config, images, samples, compared) in DATA.items():
        run = seeded(data, seed, config, images, f"evaluation.num_images={samples}")
        found.append(run)
        found.append(Measured(f"{data}_measured_s{seed}", run, ways(), after=run.name))
        found.append(Errors(f"{data}_errors_s{seed}", run, ways(), compared, after=run.name))
    return found


def summarise(outcomes: Outcomes) -> Summary:
    """Distances and errors by data, way and seed."""
    return {
        data: {
            "images": images,
            "samples": samples,
            "compared": compared,
            "floor": ends(outcomes, data, "fid_floor")[0],
            "fid": of_ways(outcomes, f"{data}_measured", "fid"),
            "error": of_ways(outcomes, f"{data}_errors", "error"),
        }
        for data, (_, images, samples, compared) in DATA.items()
    }


def draw(summary: Summary, path: Path) -> None:
    """Distance and error over evaluations, without and with guidance (dotted); digits above, letters below."""
    with figure(path, panels=2, rows=len(DATA)) as axes:
        for row, data in enumerate(DATA):
            for axis, key in zip(axes[2 * row : 2 * row + 2], ("fid", "error"), strict=True):
                found = summary[data][key]
                for number, method in enumerate(METHODS):
                    curve_over(axis, {n: found[way(method, n)] for n in EVALUATIONS}, method, number)
                    guided = {n: found[way(method, n, SCALE)] for n in evaluations_of(method, SCALE)}
                    curve_over(axis, guided, "", number, linestyle=":", alpha=0.7)
                label = f"{data}-FID" if key == "fid" else "error"
                axis.set(
                    xscale="log",
                    yscale="linear" if key == "fid" else "log",
                    xlabel="evaluations (dotted: with guidance)",
                    ylabel=label,
                )
                axis.set_xticks(EVALUATIONS, [str(n) for n in EVALUATIONS])
                axis.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
                axis.set_title(f"{data}, {summary[data]['images']:,} images")
                axis.legend()


def describe(summary: Summary) -> list[str]:
    """Distances and errors, also with a time shift, and the fewest evaluations that match the paper's sampler."""
    lines = []
    for data in DATA:
        found = summary[data]
        lines.append(f"{data}: FID of {found['samples']} samples (floor {found['floor']:.2f}), and error")
        columns = [*((n, 1.0, 1.0) for n in EVALUATIONS), *((n, SCALE, 1.0) for n in (*GUIDED, PAPER))]
        columns += [(SHIFTED, 1.0, shift) for shift in SHIFTS]
        lines.append(f"{'evaluations, scale, shift':26}" + "".join(f"{method:>24}" for method in METHODS))
        for column in columns:
            name = way("", *column).strip()
            words = [
                f"{plus_minus(fid)} {fmean(found['error'][way(method, *column)]):.4f}"
                if (fid := found["fid"].get(way(method, *column)))
                else "-"
                for method in METHODS
            ]
            lines.append(f"{name:26}" + "".join(f"{word:>24}" for word in words))
        lines += [_verdict(found["fid"], method, scale) for scale, method in product((1.0, SCALE), METHODS)]
    return lines


def _verdict(fid: dict[str, list[float]], method: str, scale: float) -> str:
    """The fewest evaluations with which a method matches the paper's sampler, and the difference that remains."""
    paper = fid[way("heun", PAPER, scale)]
    for evaluations in evaluations_of(method, scale):
        mean, error = difference(paper, fid[way(method, evaluations, scale)])
        if mean <= ALIKE * fmean(paper):
            return f"scale {scale:g}: {method} needs {evaluations}: {mean:+.2f} ±{error:.2f} to heun with {PAPER}"
    return f"scale {scale:g}: {method} never comes within {ALIKE:.0%} of heun with {PAPER}"
