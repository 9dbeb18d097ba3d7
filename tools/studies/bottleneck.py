"""Does a moderate bottleneck in the patch embedding help?

Glyphs at 32 px in four patches of 768 numbers, which pass through 768 numbers (nothing is lost) down to 8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jitscale.figures import COLOURS, curve, figure, mean_and_deviation
from studies.run import Run
from studies.tasks import Experiment, Outcomes, by_seed

WIDTHS = (8, 16, 32, 64, 128, 768)
IMAGES = 56_000
PAPER = "ImageNet, 768 numbers: widths of 32 to 512 all better than none by up to 1.3 FID, 16 does not collapse"


def tasks(seeds: int) -> Sequence[Run]:
    """All widths of a seed together."""
    return [
        Run(
            f"width_{width}_s{seed}",
            "glyphs_32.yaml",
            (
                "model.patch_size=16",
                f"model.bottleneck_dim={width}",
                f"run.seed={seed}",
                f"evaluation.seed={seed}",
                f"run.max_images={IMAGES}",
            ),
        )
        for seed in range(seeds)
        for width in WIDTHS
    ]


def summarise(outcomes: Outcomes) -> dict[str, Any]:
    """Distances by width and seed."""
    ends = {str(width): [o["measurements"][-1] for o in by_seed(outcomes, f"width_{width}")] for width in WIDTHS}
    return {
        "images": IMAGES,
        "floor": ends["8"][0]["fid_floor"],
        "fid": {width: [m["fid"] for m in found] for width, found in ends.items()},
        "label_agreement": {width: [m["label_agreement"] for m in found] for width, found in ends.items()},
    }


def draw(summary: Mapping[str, Any], path: Path) -> None:
    """FID over the width."""
    with figure(path, panels=1) as (axis,):
        seeds = list(zip(*(summary["fid"][str(width)] for width in WIDTHS), strict=True))
        curve(axis, WIDTHS, seeds, "", color=COLOURS[0], marker="o")
        axis.set_xscale("log", base=2)
        axis.set_xticks(WIDTHS, [*map(str, WIDTHS[:-1]), "768 (none)"])
        axis.set(xlabel="width of the bottleneck", ylabel="glyphs-FID", title="patches of 768 numbers")


def describe(summary: Mapping[str, Any]) -> list[str]:
    """A line for each width."""
    lines = [f"glyphs-FID after {summary['images']:,} images (floor {summary['floor']:.2f}); {PAPER}"]
    for width in WIDTHS:
        mean, deviation = mean_and_deviation(summary["fid"][str(width)])
        asked = mean_and_deviation(summary["label_agreement"][str(width)])[0]
        lines.append(f"{width:6} {mean:8.2f} ±{deviation:.2f} {asked:7.1%} as asked")
    return lines


EXPERIMENT = Experiment(
    title="the width of the bottleneck",
    tools=[["tools/make_glyphs.py", "--resolution", "32", "--output", "runs/glyphs/32px"]],
    tasks=tasks,
    summarise=summarise,
    draw=draw,
    describe=describe,
)
