"""Does a moderate bottleneck in the patch embedding help?

Letters at 32 px in four patches of 768 numbers. Each patch passes through a bottleneck of 8 to 768 numbers; at 768
nothing is lost.
"""

from pathlib import Path
from statistics import fmean

from jitscale.figures import curve_over, figure, plus_minus
from studies.run import Run, seeded
from studies.tasks import Outcomes, Shards, Summary, ends

SHARDS: Shards = [("glyphs", 32)]
WIDTHS = (8, 16, 32, 64, 128, 768)
IMAGES = 56_000
PAPER = "ImageNet, 768 numbers: widths of 32 to 512 all better than none by up to 1.3 FID, 16 does not collapse"


def tasks(seed: int) -> list[Run]:
    """A run for each width."""
    return [
        seeded(f"width_{w}", seed, "glyphs_32.yaml", IMAGES, "model.patch_size=16", f"model.bottleneck_dim={w}")
        for w in WIDTHS
    ]


def summarise(outcomes: Outcomes) -> Summary:
    """Distances by width and seed."""
    keys = ("fid", "label_agreement")
    return {
        "images": IMAGES,
        "floor": ends(outcomes, "width_8", "fid_floor")[0],
        **{key: {str(width): ends(outcomes, f"width_{width}", key) for width in WIDTHS} for key in keys},
    }


def draw(summary: Summary, path: Path) -> None:
    """Distance over the width."""
    with figure(path, panels=1) as (axis,):
        curve_over(axis, {width: summary["fid"][str(width)] for width in WIDTHS}, "")
        axis.set_xscale("log", base=2)
        axis.set_xticks(WIDTHS, [*map(str, WIDTHS[:-1]), "768 (none)"])
        axis.set(xlabel="width of the bottleneck", ylabel="glyphs-FID", title="patches of 768 numbers")


def describe(summary: Summary) -> list[str]:
    """A line for each width."""
    lines = [f"glyphs-FID after {summary['images']:,} images (floor {summary['floor']:.2f}); {PAPER}"]
    for width in WIDTHS:
        fid, asked = (summary[key][str(width)] for key in ("fid", "label_agreement"))
        lines.append(f"{width:6} {plus_minus(fid, 8)} {fmean(asked):7.1%} as asked")
    return lines
