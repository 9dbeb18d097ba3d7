"""Token routing at equal images and at equal compute.

Letters at 64 px in 64 patches, so that there are tokens to route. Half of them skip the four middle blocks of six: two
thirds of the depth, as in JiT-B with the default `model.route_blocks`. They do so during the whole training or its
first 80%.
"""

from pathlib import Path
from typing import Any

from jitscale.figures import UNCONNECTED, curve_over, figure, plus_minus
from studies.run import SHORT_AVERAGE, Run, flops_of, images_at, seeded
from studies.tasks import Outcomes, Shards, Summary, by_seed, difference

SHARDS: Shards = [("glyphs", 64)]
CONFIG = "glyphs_64.yaml"
BASE = ("model.patch_size=8", "data.held_out=0.01", *SHORT_AVERAGE)
ROUTED = (*BASE, "model.route_share=0.5", "model.route_blocks=[1,-1]")
IMAGES, SAMPLES = 22_400, 400
ENDED = 0.8  # share of a training after which all tokens pass all blocks
ROWS = {  # of the table: the task, and which of its measurements
    "all tokens": ("all", 0),
    "half, equal images": ("half", 0),
    "half until 80%, equal images": ("ended", 0),
    "half, equal FLOPs": ("half", 1),
    "half until 80%, equal FLOPs": ("ended_longer", 0),
}
KEYS = {"fid": "glyphs-FID", "held_out": "held-out loss", "label_agreement": "as asked"}


def tasks(seed: int) -> list[Run]:
    """Trainings with all tokens, and with half of them at equal images and at equal compute."""
    flops = IMAGES * flops_of(CONFIG, BASE)

    def run(what: str, images: int, *settings: str, **more: Any) -> Run:
        return seeded(what, seed, CONFIG, images, *settings, f"evaluation.num_images={SAMPLES}", **more)

    def ended(what: str, images: int) -> Run:
        return run(what, images, *ROUTED, f"run.route_until_images={round(ENDED * images)}")

    return [
        run("all", IMAGES, *BASE),
        run("half", images_at(flops, CONFIG, ROUTED), *ROUTED, measured_every=IMAGES),
        ended("ended", IMAGES),
        ended("ended_longer", images_at(flops, CONFIG, ROUTED, ENDED)),
    ]


def summarise(outcomes: Outcomes) -> Summary:
    """Measurements by row and seed, with images seen and operations of training; seconds by task and seed."""
    rows = {}
    for row, (task, at) in ROWS.items():
        found = [outcome["measurements"][at] for outcome in by_seed(outcomes, task)]
        images, until = found[0]["images"], ENDED if "until" in row else 1.0
        cost = images * flops_of(CONFIG, BASE if task == "all" else ROUTED, until)
        numbers = {key: [seed[key] for seed in found] for key in KEYS}
        rows[row] = {"images": images, "flops": cost, **numbers}
    names = dict.fromkeys(task for task, _ in ROWS.values())
    seconds = {name: [outcome["training_seconds"] for outcome in by_seed(outcomes, name)] for name in names}
    return {"rows": rows, "seconds": seconds, "floor": outcomes["all_s0"]["measurements"][0]["fid_floor"]}


def draw(summary: Summary, path: Path) -> None:
    """Distance and held-out loss over the compute of training."""
    with figure(path, panels=2) as axes:
        for axis, key in zip(axes, ("fid", "held_out"), strict=True):
            for number, (row, found) in enumerate(summary["rows"].items()):
                look = {**UNCONNECTED, "fillstyle": "none" if "images" in row else "full"}
                curve_over(axis, {found["flops"] / 1e12: found[key]}, row, number, **look)
            axis.set(xlabel="training compute (TFLOP)", ylabel=KEYS[key])
        axes[0].legend()


def describe(summary: Summary) -> list[str]:
    """A row for each training; the difference to all tokens is taken within a seed, with its standard error."""
    lines = [f"{'':30}{'images':>8}{'TFLOP':>8}" + "".join(f"{title:>34}" for title in KEYS.values())]
    base = summary["rows"]["all tokens"]
    for row, found in summary["rows"].items():
        line = f"{row:30}{found['images']:8,}{found['flops'] / 1e12:8.2f}"
        for key in KEYS:
            digits = 2 if key == "fid" else 4
            mean, error = difference(base[key], found[key])
            line += f"{plus_minus(found[key], digits=digits) + f' ({mean:+.{digits}f} ±{error:.{digits}f})':>34}"
        lines.append(line)
    seconds = ", ".join(f"{name} {plus_minus(found, digits=0)}" for name, found in summary["seconds"].items())
    return [*lines, f"seconds of training: {seconds}", f"floor {summary['floor']:.2f}"]
