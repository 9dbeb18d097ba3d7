"""Guidance, its interval and the length of the average: how much a lazy choice costs.

One network for the digits a seed, several averages of its weights, and a sweep over all combinations.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jitscale import parallel
from jitscale.checkpoints.opening import open_weights
from jitscale.config import ema_name
from jitscale.evaluation.evaluator import Evaluator
from jitscale.evaluation.final import measure_settings
from jitscale.evaluation.generate import ready_to_sample
from jitscale.evaluation.settings import settings_of
from jitscale.figures import COLOURS, MARKERS, curve, figure, mean_and_deviation
from jitscale.model.jit import JiT
from studies.run import Run
from studies.tasks import Experiment, Outcomes, Task, by_seed

SCALES = (1.0, 1.5, 2.0, 3.0, 4.0)
INTERVALS = ("0:1", "0.1:1", "0.3:0.9")
DECAYS = (0.9, 0.99, 0.995, 0.999)
CHOSEN = (ema_name(0.99), "0.1:1")
IMAGES, SAMPLES = 128_000, 500


@dataclass(frozen=True)
class Sweep:
    """Measures all settings for the network of another task."""

    run: Run
    samples: int = SAMPLES

    @property
    def name(self) -> str:
        """Its folder's."""
        return self.run.name.replace("trained", "swept")

    @property
    def after(self) -> str | None:
        """The training."""
        return self.run.name

    def cost(self, folder: Path) -> int:
        """In images trained, about."""
        return self.samples * 10 * len(DECAYS) * (1 + (len(SCALES) - 1) * len(INTERVALS))

    def execute(self, folder: Path) -> dict[str, Any]:
        """Distances by average, interval and scale."""
        started = time.perf_counter()
        world = parallel.start(parallel.choose_device("cpu"))
        config = self.run.load(folder)
        stored = open_weights(folder / self.run.name)
        axes = [
            f"guidance={','.join(f'{scale:g}' for scale in SCALES)}",
            f"ema={','.join(ema_name(decay) for decay in DECAYS)}",
            f"interval={','.join(INTERVALS)}",
        ]

        def network(name: str) -> JiT:
            return ready_to_sample(stored.weight_set(name).build(), config, world.device)

        evaluator = Evaluator(config, world, folder / self.name)
        settings = settings_of(axes, config, stored.weight_sets)
        results = list(measure_settings(settings, network, evaluator, self.samples))
        return {
            "fid": {_key(s.weights, s.interval, s.scale): measured["fid"] for s, measured in results},
            "training_seconds": 0.0,
            "measuring_seconds": time.perf_counter() - started,
        }


def _key(weights: str, interval: Sequence[float], scale: float) -> str:
    return f"{weights} {interval[0]:g}:{interval[1]:g} {scale:g}"


def tasks(seeds: int) -> Sequence[Task]:
    """A training and its sweep for each seed."""
    found: list[Task] = []
    for seed in range(seeds):
        run = Run(
            f"trained_s{seed}",
            "digits_32.yaml",
            (
                "model.patch_size=8",
                f"ema.decays=[{','.join(f'{decay:g}' for decay in DECAYS)}]",
                f"evaluation.weights={CHOSEN[0]}",
                "evaluation.steps=10",
                f"evaluation.num_images={SAMPLES}",
                f"run.seed={seed}",
                f"evaluation.seed={seed}",
                f"run.max_images={IMAGES}",
            ),
        )
        found += [run, Sweep(run)]
    return found


def summarise(outcomes: Outcomes) -> dict[str, Any]:
    """Distances by setting and seed; the best setting on average and what others cost beside it."""
    seeds = [outcome["fid"] for outcome in by_seed(outcomes, "swept")]
    fid = {key: [seed[key] for seed in seeds] for key in seeds[0]}
    best = min(fid, key=lambda key: mean_and_deviation(fid[key])[0])
    return {"images": IMAGES, "samples": SAMPLES, "fid": fid, "best": best}


def of(summary: Mapping[str, Any], weights: str, interval: str, scale: float) -> list[float]:
    """Distances of the seeds; without guidance there is one interval."""
    return summary["fid"][f"{weights} {INTERVALS[0] if scale == 1 else interval} {scale:g}"]


def draw(summary: Mapping[str, Any], path: Path) -> None:
    """FID over guidance for every interval, and for every average."""
    averages = [ema_name(decay) for decay in DECAYS]
    with figure(path, panels=2) as (by_interval, by_average):
        for number, interval in enumerate(INTERVALS):
            seeds = list(zip(*(of(summary, CHOSEN[0], interval, scale) for scale in SCALES), strict=True))
            curve(
                by_interval,
                SCALES,
                seeds,
                f"({interval.replace(':', ', ')})",
                color=COLOURS[number],
                marker=MARKERS[number],
            )
        for number, average in enumerate(averages):
            seeds = list(zip(*(of(summary, average, CHOSEN[1], scale) for scale in SCALES), strict=True))
            curve(by_average, SCALES, seeds, average, color=COLOURS[number], marker=MARKERS[number])
        by_interval.set(xlabel="guidance scale", ylabel="digits-FID", title=f"interval, {CHOSEN[0]}")
        by_average.set(
            xlabel="guidance scale", ylabel="digits-FID", title=f"average, interval ({CHOSEN[1]})", yscale="log"
        )
        by_interval.legend()
        by_average.legend()


def describe(summary: Mapping[str, Any]) -> list[str]:
    """The best setting, and what leaving one thing to chance costs."""
    best = mean_and_deviation(summary["fid"][summary["best"]])
    weights, interval, scale = summary["best"].split()
    lines = [f"best: {summary['best']}: digits-FID {best[0]:.2f} ±{best[1]:.2f}"]
    others = {
        "no guidance": [of(summary, weights, interval, 1.0)],
        "another scale": [of(summary, weights, interval, s) for s in SCALES if s != float(scale)],
        "another interval": [of(summary, weights, i, float(scale)) for i in INTERVALS if i != interval],
        "another average": [of(summary, ema_name(d), interval, float(scale)) for d in DECAYS if ema_name(d) != weights],
    }
    for name, found in others.items():
        means = [mean_and_deviation(fid)[0] for fid in found]
        lines.append(f"{name}: {min(means):.2f} to {max(means):.2f}")
    return lines


EXPERIMENT = Experiment(
    title="guidance, its interval and the length of the average",
    tools=[["tools/make_digits.py", "--resolution", "32", "--output", "runs/digits/32px"]],
    tasks=tasks,
    summarise=summarise,
    draw=draw,
    describe=describe,
)
