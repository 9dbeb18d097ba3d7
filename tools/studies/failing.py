"""v-prediction fails at large patches; one skip connection makes the difference.

x-prediction with the loss in v is v-prediction by a network with one long skip connection: v = (net - z) / (1 - t).
Digits, patches and loss are the same. With the skip the network need not carry the noise; without it (net = v) it must.
"""

from pathlib import Path
from statistics import fmean
from typing import Any

from jitscale.figures import curve, figure, plus_minus, show_png
from studies.run import Run, seeded
from studies.tasks import Outcomes, Shards, Summary, by_seed, ends

SHARDS: Shards = [("digits", 32)]
IMAGES, POINTS = 128_000, 8
WAYS = {"x": "x-prediction: v = (net - z) / (1 - t)", "v": "v-prediction: v = net"}
STRIP = 6  # samples, of the digits 0 to 5


def tasks(seed: int) -> list[Run]:
    """A run each way, measured during training."""
    measured: dict[str, Any] = {"measured_every": IMAGES // POINTS, "strip": STRIP}
    return [
        seeded(way, seed, "digits_32.yaml", IMAGES, f"diffusion.prediction={way}", "diffusion.loss=v", **measured)
        for way in WAYS
    ]


def summarise(outcomes: Outcomes) -> Summary:
    """Distances over images by way and seed; strips of the first seed."""
    found = {way: by_seed(outcomes, way) for way in WAYS}
    return {
        "images": [m["images"] for m in found["x"][0]["measurements"]],
        "fid": {way: [[m["fid"] for m in o["measurements"]] for o in runs] for way, runs in found.items()},
        "label_agreement": {way: ends(outcomes, way, "label_agreement") for way in WAYS},
        "strips": {way: [m["strip"] for m in runs[0]["measurements"][1::2]] for way, runs in found.items()},
        "floor": ends(outcomes, "x", "fid_floor")[0],
    }


def draw(summary: Summary, path: Path) -> None:
    """Distance over training, and samples of the same noise after more and more images."""
    images = [count / 1000 for count in summary["images"]]
    with figure(path, "AA;BC") as (distances, *samples):
        for number, (way, name) in enumerate(WAYS.items()):
            curve(distances, images, summary["fid"][way], name, number)
        distances.axhline(summary["floor"], color="black", linewidth=0.8, linestyle=":")
        distances.set(xlabel="thousand images seen", ylabel="digits-FID", yscale="log")
        distances.legend()
        for axis, way in zip(samples, WAYS, strict=True):
            show_png(axis, summary["strips"][way], [f"{count:g}k" for count in images[1::2]])
            axis.set_title(f"{way}-prediction")


def describe(summary: Summary) -> list[str]:
    """The final numbers of both ways."""
    lines = [f"digits-FID after {summary['images'][-1]:,} images (floor {summary['floor']:.2f})"]
    for way, name in WAYS.items():
        asked = fmean(summary["label_agreement"][way])
        lines.append(f"{name:40} {plus_minus([s[-1] for s in summary['fid'][way]], 8)} {asked:7.1%} as asked")
    return lines
