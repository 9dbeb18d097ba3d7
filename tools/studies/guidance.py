"""The cost of a wrong guidance scale, interval or length of the average.

For each seed: one network for the digits, several averages of its weights, and a sweep over all combinations.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from jitscale import parallel
from jitscale.checkpoints.opening import open_weights
from jitscale.config import ema_name
from jitscale.evaluation.evaluator import Evaluator
from jitscale.evaluation.final import measure_points
from jitscale.evaluation.generate import ready_on_all_ranks
from jitscale.evaluation.sweep import sweep_points
from jitscale.figures import curve_over, figure, plus_minus
from jitscale.model.jit import JiT
from studies.run import Run, seeded
from studies.tasks import Outcomes, Shards, Summary, Task, by_seed

SHARDS: Shards = [("digits", 32)]
SCALES = (1.0, 1.5, 2.0, 3.0, 4.0)
INTERVALS = ("0:1", "0.1:1", "0.3:0.9")
DECAYS = (0.9, 0.99, 0.995, 0.999)
CHOSEN = (ema_name(0.99), "0.1:1")
IMAGES, SAMPLES = 128_000, 500


@dataclass(frozen=True)
class Sweep(Task):
    """Measures all settings with the network of another task."""

    run: Run
    samples: int = SAMPLES

    def cost(self, folder: Path) -> int:
        return self.samples * 10 * len(DECAYS) * (1 + (len(SCALES) - 1) * len(INTERVALS))

    def execute(self, folder: Path) -> dict[str, Any]:
        """Distances by average, interval and scale."""
        world = parallel.start(parallel.choose_device("cpu"))
        config = self.run.load(folder)
        stored = open_weights(folder / self.run.name)
        config.evaluation.num_images = self.samples
        config.evaluation.sweep = [
            f"guidance={','.join(f'{scale:g}' for scale in SCALES)}",
            f"ema={','.join(ema_name(decay) for decay in DECAYS)}",
            f"interval={','.join(INTERVALS)}",
        ]

        def network(name: str) -> JiT:
            return ready_on_all_ranks(stored.network(name, world.device), config, world)

        settings = sweep_points(config, stored.weight_sets)
        results = measure_points(settings, network, Evaluator(config, world, folder / self.name), neighbours=False)
        fid = {_key(s.weights, s.guidance_interval, s.guidance_scale): measured["fid"] for s, measured in results}
        return {"fid": fid}


def _key(weights: str, interval: Sequence[float], scale: float) -> str:
    return f"{weights} {interval[0]:g}:{interval[1]:g} {scale:g}"


def tasks(seed: int) -> list[Task]:
    """A training and its sweep."""
    averages = f"ema.decays=[{','.join(f'{decay:g}' for decay in DECAYS)}]"
    measured = (f"evaluation.weights={CHOSEN[0]}", "evaluation.steps=10", f"evaluation.num_images={SAMPLES}")
    run = seeded("trained", seed, "digits_32.yaml", IMAGES, "model.patch_size=8", averages, *measured)
    return [run, Sweep(f"swept_s{seed}", run, after=run.name)]


def summarise(outcomes: Outcomes) -> Summary:
    """Distances by setting and seed, and the best setting on average."""
    seeds = [outcome["fid"] for outcome in by_seed(outcomes, "swept")]
    fid = {key: [seed[key] for seed in seeds] for key in seeds[0]}
    best = min(fid, key=lambda key: fmean(fid[key]))
    return {"images": IMAGES, "samples": SAMPLES, "fid": fid, "best": best}


def distances(summary: Summary, weights: str, interval: str, scale: float) -> list[float]:
    """The distances of all seeds. Without guidance the interval has no effect, so it was measured once."""
    return summary["fid"][f"{weights} {INTERVALS[0] if scale == 1 else interval} {scale:g}"]


def draw(summary: Summary, path: Path) -> None:
    """Distance over guidance, for each interval and for each average."""
    with figure(path, panels=2) as (by_interval, by_average):
        for number, interval in enumerate(INTERVALS):
            found = {scale: distances(summary, CHOSEN[0], interval, scale) for scale in SCALES}
            curve_over(by_interval, found, f"({interval.replace(':', ', ')})", number)
        for number, average in enumerate(map(ema_name, DECAYS)):
            found = {scale: distances(summary, average, CHOSEN[1], scale) for scale in SCALES}
            curve_over(by_average, found, average, number)
        for axis in (by_interval, by_average):
            axis.set(xlabel="guidance scale", ylabel="digits-FID")
            axis.legend()
        by_interval.set_title(f"intervals, with {CHOSEN[0]}")
        by_average.set(title=f"averages, in ({CHOSEN[1].replace(':', ', ')})", yscale="log")


def describe(summary: Summary) -> list[str]:
    """The best setting, and the distances if one part of it changes."""
    weights, interval, scale = summary["best"].split()
    lines = [f"best: {summary['best']}: digits-FID {plus_minus(summary['fid'][summary['best']])}"]
    others = {
        "no guidance": [(weights, interval, 1.0)],
        "another scale": [(weights, interval, other) for other in SCALES if other != float(scale)],
        "another interval": [(weights, other, float(scale)) for other in INTERVALS if other != interval],
        "another average": [(other, interval, float(scale)) for other in map(ema_name, DECAYS) if other != weights],
    }
    for name, settings in others.items():
        means = [fmean(distances(summary, *setting)) for setting in settings]
        lines.append(f"{name}: {min(means):.2f} to {max(means):.2f}")
    return lines
