"""The nine pairs of prediction and loss, with large and with small patches.

Digits at 32 px have patches of 768 numbers, more than the width of the network. It can carry an image, which lies near
a manifold of few dimensions, but not noise, which fills all dimensions. Digits at 16 px have patches of 48 numbers,
fewer than the width. The paper's table 2 (arXiv 2511.13720) does the same with ImageNet at 256 and 64 px.
"""

from itertools import product
from pathlib import Path
from typing import Any

from jitscale.figures import UNCONNECTED, curve_over, figure, plus_minus, show_png
from studies.run import Run, seeded
from studies.tasks import Outcomes, Shards, Summary, ends

SHARDS: Shards = [("digits", 16), ("digits", 32)]
SPACES = ("x", "e", "v")
STRIP = 5  # samples, of the digits 0 to 4
WIDE: dict[str, tuple[str, ...]] = {
    "large": (),
    # The embedding's bottleneck is also wide enough for the whole patch.
    "small": ("model.image_size=16", "model.patch_size=4", "model.bottleneck_dim=48"),
}
TITLES = ("large patches: 768 numbers, width 64", "small patches: 48 numbers, width 64")
IMAGES = 64_000
PAPER = {  # FID on ImageNet, by loss and prediction
    "large": {"x": (10.14, 379.21, 107.55), "e": (10.45, 394.58, 126.88), "v": (8.62, 372.38, 96.53)},
    "small": {"x": (5.76, 6.20, 6.12), "e": (3.56, 4.02, 3.76), "v": (3.55, 3.63, 3.46)},
}


def tasks(seed: int) -> list[Run]:
    """All pairs, with both patches."""
    found = []
    for (patches, settings), loss, prediction in product(WIDE.items(), SPACES, SPACES):
        pair = (f"diffusion.prediction={prediction}", f"diffusion.loss={loss}")
        what = f"{patches}_{prediction}_{loss}"
        found.append(seeded(what, seed, "digits_32.yaml", IMAGES, *settings, *pair, strip=STRIP))
    return found


def summarise(outcomes: Outcomes) -> Summary:
    """Distances and labels by patch size, loss, prediction and seed; strips of the first seed."""
    cells: dict[str, dict[str, dict[str, Any]]] = {patches: {loss: {} for loss in SPACES} for patches in WIDE}
    for patches, loss, prediction in product(WIDE, SPACES, SPACES):
        name = f"{patches}_{prediction}_{loss}"
        numbers = {key: ends(outcomes, name, key) for key in ("fid", "label_agreement")}
        cells[patches][loss][prediction] = {**numbers, "strip": ends(outcomes, name, "strip")[0]}
    floors = {patches: ends(outcomes, f"{patches}_x_v", "fid_floor")[0] for patches in WIDE}
    return {"cells": cells, "floor": floors, "images": IMAGES}


def draw(summary: Summary, path: Path) -> None:
    """Distances of the pairs, large patches left, small ones right; below, samples of the same noise and labels."""
    with figure(path, panels=2, rows=2) as axes:
        for axis, below, patches, title in zip(axes[:2], axes[2:], WIDE, TITLES, strict=True):
            for number, prediction in enumerate(SPACES):
                rows = summary["cells"][patches]
                found = {at + 0.12 * (number - 1): rows[loss][prediction]["fid"] for at, loss in enumerate(SPACES)}
                curve_over(axis, found, f"{prediction}-prediction", number, **UNCONNECTED)
            axis.axhline(summary["floor"][patches], color="black", linewidth=0.8, linestyle=":")
            axis.set_xticks(range(len(SPACES)), [f"{loss}-loss" for loss in SPACES])
            axis.set(ylabel="digits-FID", yscale="log", title=title)
            axis.legend()
            pairs = list(product(SPACES, SPACES))
            strips = [summary["cells"][patches][loss][prediction]["strip"] for prediction, loss in pairs]
            show_png(below, strips, [f"{prediction}-prediction, {loss}-loss" for prediction, loss in pairs])


def describe(summary: Summary) -> list[str]:
    """The paper's table with our numbers, and the paper's in brackets."""
    lines = []
    for patches, rows in summary["cells"].items():
        lines.append(f"{patches} patches, digits-FID (floor {summary['floor'][patches]:.2f}); in brackets ImageNet's")
        lines.append(f"{'loss':8}" + "".join(f"{prediction + '-prediction':>28}" for prediction in SPACES))
        for loss, cells in rows.items():
            papers = zip(SPACES, PAPER[patches][loss], strict=True)
            words = [f"{plus_minus(cells[space]['fid'], digits=1)} ({paper:g})" for space, paper in papers]
            lines.append(f"{loss:8}" + "".join(f"{word:>28}" for word in words))
    return lines
