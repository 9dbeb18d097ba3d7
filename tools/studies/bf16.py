"""Compare bf16 weights with ZeRO stage 2 with the recipe's autocast with float32 weights.

Both multiply in bf16 and update float32 masters. With bf16 weights the network uses rounded masters, its norms and
gradients are bf16, and half as many bytes travel. A seed has the same initial weights, order of the data, noise and
samples both ways, so the difference within a seed has less spread than either result.
"""

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from jitscale.figures import curve, figure, plus_minus
from jitscale.tracking import read_held_out, read_metrics
from studies.run import Run
from studies.tasks import Outcomes, Shards, Summary, by_seed, difference, ends

SHARDS: Shards = [("digits", 32)]
WAYS = {
    "autocast": ("engine.precision=autocast", "engine.zero_stage=1"),
    "bf16": ("engine.precision=bf16", "engine.zero_stage=2"),
}
TITLES = {"autocast": "autocast, float32 weights, stage 1", "bf16": "bf16 weights, stage 2"}
IMAGES, POINTS = 64_000, 4
LOSSES = ("loss", "held_out_model", "held_out_average")
AVERAGE = "ema_0.99"
HELD_OUT = ("data.held_out=0.1", f"evaluation.held_out_every_images={IMAGES // POINTS}", "tracking.log_every_steps=10")


@dataclass(frozen=True)
class Watched(Run):
    """A run whose outcome also holds its losses."""

    def execute(self, folder: Path) -> dict[str, Any]:
        """Like `Run.execute`; the outcome also has each of `LOSSES`, with a value for each of `POINTS` parts.

        The parts of the training are equally long. `loss` is the mean training loss of a part; the others are held-out
        losses at its end.
        """
        outcome, run_dir = super().execute(folder), folder / self.name
        steps, held_out = read_metrics(run_dir), read_held_out(run_dir)
        part = (self.load(folder).run.max_images or 0) / len(held_out)
        losses = [[line["loss"] for line in steps if (line["images"] - 1) // part == at] for at in range(len(held_out))]
        outcome["loss"] = [fmean(found) for found in losses]
        outcome["held_out_model"] = [line["held_out/model"] for line in held_out]
        outcome["held_out_average"] = [line[f"held_out/{AVERAGE}"] for line in held_out]
        outcome["images"] = [line["images"] for line in held_out]
        return outcome


def tasks(seed: int) -> list[Watched]:
    """A run each way."""
    own = (f"run.seed={seed}", f"evaluation.seed={seed}", f"run.max_images={IMAGES}")
    return [Watched(f"{way}_s{seed}", "digits_32.yaml", (*settings, *HELD_OUT, *own)) for way, settings in WAYS.items()]


def summarise(outcomes: Outcomes) -> Summary:
    """Losses (points) and distances by way and seed."""
    runs = {way: by_seed(outcomes, way) for way in WAYS}
    return {
        "images": runs["bf16"][0]["images"],
        **{key: {way: [outcome[key] for outcome in runs[way]] for way in WAYS} for key in LOSSES},
        "fid": {way: ends(outcomes, way, "fid") for way in WAYS},
        "label_agreement": {way: ends(outcomes, way, "label_agreement") for way in WAYS},
        "floor": ends(outcomes, "bf16", "fid_floor")[0],
    }


def draw(summary: Summary, path: Path) -> None:
    """Held-out loss both ways over training, and the difference of each loss for each part of the training."""
    images = [count / 1000 for count in summary["images"]]
    with figure(path, panels=2) as (losses, differences):
        for number, way in enumerate(WAYS):
            curve(losses, images, summary["held_out_model"][way], TITLES[way], number)
        losses.set(xlabel="thousand images seen", ylabel="held-out loss", title="held-out digits")
        losses.legend()
        titles = ("training loss", "held-out, weights", "held-out, average")
        for number, (key, title) in enumerate(zip(LOSSES, titles, strict=True)):
            by_seed = zip(*(summary[key][way] for way in WAYS), strict=True)
            relative = [[100 * (b / a - 1) for a, b in zip(*pair, strict=True)] for pair in by_seed]
            curve(differences, images, relative, title, number)
        differences.axhline(0, color="black", linewidth=0.8, linestyle=":")
        differences.set(xlabel="thousand images seen", ylabel="%", title="bf16 weights minus autocast")
        differences.legend()


def describe(summary: Summary) -> list[str]:
    """Means and deviations both ways at the end, and their difference with its standard error."""
    lines = [f"after {summary['images'][-1]:,} images (digits-FID: floor {summary['floor']:.2f})"]
    lines.append(f"{'':18}" + "".join(f"{TITLES[way]:>36}" for way in WAYS) + f"{'difference':>22}")
    ending = {key: {way: [run[-1] for run in summary[key][way]] for way in WAYS} for key in LOSSES}
    for key, by_way in {**ending, "fid": summary["fid"]}.items():
        digits = 2 if key == "fid" else 5
        numbers = "".join(f"{plus_minus(by_way[way], digits=digits):>36}" for way in WAYS)
        mean, error = difference(by_way["autocast"], by_way["bf16"])
        lines.append(f"{key:18}{numbers}{f'{mean:+.{digits}f} ±{error:.{digits}f}':>22}")
    return lines
