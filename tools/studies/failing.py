"""Where v-prediction fails, and the one skip connection that makes the difference.

x-prediction with the loss in v is v-prediction of a network with a long skip connection: v = (net - z) / (1 - t). The
same digits, patches and loss; with the skip the network need not carry the noise, without it (net = v) it must.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jitscale.figures import COLOURS, MARKERS, curve, figure, mean_and_deviation, show_png
from studies.run import Run
from studies.tasks import Experiment, Outcomes, by_seed

IMAGES, POINTS = 128_000, 8
WAYS = {"x": "x-prediction: v = (net - z) / (1 - t)", "v": "v-prediction: v = net"}
STRIP = 10
SHOWN = 0.6  # of a strip; noise makes large files


def tasks(seeds: int) -> Sequence[Run]:
    """Both ways, measured while they train."""
    return [
        Run(
            f"{way}_s{seed}",
            "digits_32.yaml",
            (
                f"diffusion.prediction={way}",
                "diffusion.loss=v",
                f"run.seed={seed}",
                f"evaluation.seed={seed}",
                f"run.max_images={IMAGES}",
            ),
            measured_every=IMAGES // POINTS,
            strip=STRIP,
        )
        for seed in range(seeds)
        for way in WAYS
    ]


def summarise(outcomes: Outcomes) -> dict[str, Any]:
    """Distances over images by way and seed; strips of the first seed."""
    found = {way: by_seed(outcomes, way) for way in WAYS}
    return {
        "images": [m["images"] for m in found["x"][0]["measurements"]],
        "fid": {way: [[m["fid"] for m in o["measurements"]] for o in runs] for way, runs in found.items()},
        "label_agreement": {
            way: [o["measurements"][-1]["label_agreement"] for o in runs] for way, runs in found.items()
        },
        "strips": {way: [m["strip"] for m in runs[0]["measurements"][1::2]] for way, runs in found.items()},
        "floor": found["x"][0]["measurements"][0]["fid_floor"],
    }


def draw(summary: Mapping[str, Any], path: Path) -> None:
    """FID over training, and the same noise at growing numbers of images."""
    images = [count / 1000 for count in summary["images"]]
    with figure(path, panels=3) as (distances, *samples):
        for number, (way, name) in enumerate(WAYS.items()):
            style = {"color": COLOURS[number], "marker": MARKERS[number]}
            curve(distances, images, summary["fid"][way], name, **style)
        distances.axhline(summary["floor"], color="black", linewidth=0.8, linestyle=":")
        distances.set(xlabel="thousand images seen", ylabel="digits-FID", yscale="log")
        distances.legend(fontsize=7)
        for axis, way in zip(samples, WAYS, strict=True):
            show_png(axis, summary["strips"][way], [f"{count:g}k" for count in images[1::2]], SHOWN)
            axis.set_title(f"{way}-prediction")


def describe(summary: Mapping[str, Any]) -> list[str]:
    """Where both ways end."""
    lines = [f"digits-FID after {summary['images'][-1]:,} images (floor {summary['floor']:.2f})"]
    for way, name in WAYS.items():
        mean, deviation = mean_and_deviation([seed[-1] for seed in summary["fid"][way]])
        asked = mean_and_deviation(summary["label_agreement"][way])[0]
        lines.append(f"{name:40} {mean:8.2f} ±{deviation:.2f} {asked:7.1%} as asked")
    return lines


EXPERIMENT = Experiment(
    title="x- and v-prediction over training at a large patch; the skip connection",
    tools=[["tools/make_digits.py", "--resolution", "32", "--output", "runs/digits/32px"]],
    tasks=tasks,
    summarise=summarise,
    draw=draw,
    describe=describe,
)
