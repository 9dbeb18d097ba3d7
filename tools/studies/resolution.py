"""Resolution: the same noise looks weaker on larger images; the same number of tokens costs the same.

Pooling an image of k times the pixels a side divides the deviation of white noise by k, and moves the logarithm of the
signal-to-noise ratio by 2 log k (simple diffusion, Hoogeboom et al. 2023, arXiv 2301.11093). So the noise scale is
multiplied by k, or the times are shifted. Glyphs, 16 tokens at every resolution.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from jitscale.data.glyphs import Glyphs
from jitscale.figures import COLOURS, MARKERS, curve, figure, mean_and_deviation
from studies.run import Run
from studies.tasks import Experiment, Outcomes, by_seed

SIZES = (32, 64, 128)
MUS = (0.0, -0.8, -1.6)
IMAGES = 24_000
SHOWN_TIME = 0.4
GLYPH = 3


def tasks(seeds: int) -> Sequence[Run]:
    """For each seed: every resolution with its noise scale, without it, and two other means of the times."""
    found = []
    for seed in range(seeds):
        own = (f"run.seed={seed}", f"evaluation.seed={seed}", f"run.max_images={IMAGES}", "optim.warmup_images=1600")
        found += [Run(f"scaled_{size}_s{seed}", f"glyphs_{size}.yaml", own) for size in SIZES]
        found += [
            Run(f"unscaled_{size}_s{seed}", f"glyphs_{size}.yaml", (*own, "diffusion.noise_scale=1.0"))
            for size in SIZES[1:]
        ]
        found += [
            Run(f"mu_{mu:g}_s{seed}", "glyphs_64.yaml", (*own, f"diffusion.mu={mu}", "diffusion.noise_scale=1.0"))
            for mu in MUS
            if mu != -0.8  # which unscaled_64 has
        ]
    return found


def summarise(outcomes: Outcomes) -> dict[str, Any]:
    """Distances and seconds by run and seed."""

    def ends(name: str) -> list[float]:
        return [outcome["measurements"][-1]["fid"] for outcome in by_seed(outcomes, name)]

    return {
        "images": IMAGES,
        "scaled": {str(size): ends(f"scaled_{size}") for size in SIZES},
        "unscaled": {"32": ends("scaled_32"), **{str(size): ends(f"unscaled_{size}") for size in SIZES[1:]}},
        "mu": {f"{mu:g}": ends("unscaled_64" if mu == -0.8 else f"mu_{mu:g}") for mu in MUS},
        "floor": {str(size): outcomes[f"scaled_{size}_s0"]["measurements"][-1]["fid_floor"] for size in SIZES},
        "training_seconds": {
            str(size): [outcome["training_seconds"] for outcome in by_seed(outcomes, f"scaled_{size}")]
            for size in SIZES
        },
        "flops_an_image": {str(size): outcomes[f"scaled_{size}_s0"]["flops_an_image"] for size in SIZES},
    }


def noisy(size: int, noise_scale: float) -> Any:
    """A glyph at SHOWN_TIME, pooled to the smallest size: (S, S, 3) in [0, 1]."""
    image = torch.from_numpy(np.asarray(Glyphs(GLYPH + 1, size)[GLYPH])).permute(2, 0, 1)[None] / 127.5 - 1
    noise = noise_scale * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    pooled = F.avg_pool2d(SHOWN_TIME * image + (1 - SHOWN_TIME) * noise, size // SIZES[0])
    return (pooled[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1).numpy()


def draw(summary: Mapping[str, Any], path: Path) -> None:
    """What pooling leaves of the noise; distances with and without noise scale; and over mu."""
    with figure(path, panels=4, width=3.6) as (seen, ratio, scales, means):
        rows = [
            np.concatenate([noisy(size, scale(size)) for size in SIZES], 1)
            for scale in (lambda s: 1.0, lambda s: s / 32)
        ]
        seen.imshow(np.concatenate(rows), interpolation="nearest")
        seen.set_yticks([16, 48], ["scale 1", "scale k"])
        seen.set_xticks([16, 48, 80], [f"{size} px" for size in SIZES])
        seen.grid(visible=False)
        seen.set_title(f"t = {SHOWN_TIME}, pooled to 32 px")
        t = np.linspace(0.02, 0.98, 97)
        for number, size in enumerate(SIZES):
            shift = 2 * math.log(size / SIZES[0])
            ratio.plot(t, 2 * np.log(t / (1 - t)) + shift, color=COLOURS[number], label=f"{size} px, scale 1")
        ratio.set(xlabel="t", ylabel="log SNR after pooling to 32 px")
        ratio.legend(fontsize=7)
        for number, (key, label) in enumerate((("scaled", "noise scale k"), ("unscaled", "noise scale 1"))):
            seeds = list(zip(*(summary[key][str(size)] for size in SIZES), strict=True))
            curve(scales, SIZES, seeds, label, color=COLOURS[number], marker=MARKERS[number])
        scales.set_xticks(SIZES)
        scales.set(xlabel="pixels a side", ylabel="glyphs-FID", yscale="log")
        scales.legend()
        seeds = list(zip(*(summary["mu"][f"{mu:g}"] for mu in MUS), strict=True))
        curve(means, MUS, seeds, "64 px, noise scale 1", color=COLOURS[1], marker=MARKERS[1])
        scaled = mean_and_deviation(summary["scaled"]["64"])
        means.errorbar(
            [-0.8], [scaled[0]], yerr=[scaled[1]], fmt="o", capsize=2, color=COLOURS[0], label="64 px, scale 2"
        )
        means.set(xlabel="mean of the times' logits, mu", ylabel="glyphs-FID")
        means.legend(fontsize=7)


def describe(summary: Mapping[str, Any]) -> list[str]:
    """Distances, and what an image costs."""
    lines = [f"glyphs-FID after {summary['images']:,} images"]
    for size in SIZES:
        cells = [mean_and_deviation(summary[key][str(size)]) for key in ("scaled", "unscaled")]
        seconds = mean_and_deviation(summary["training_seconds"][str(size)])[0]
        flops = summary["flops_an_image"][str(size)]
        lines.append(
            f"{size:4} px: noise scale {size // SIZES[0]}: {cells[0][0]:7.1f} ±{cells[0][1]:.1f}, noise scale 1: "
            f"{cells[1][0]:7.1f} ±{cells[1][1]:.1f}; floor {summary['floor'][str(size)]:.2f}; "
            f"{flops / 1e6:.0f} MFLOP and {1e3 * seconds / summary['images']:.2f} ms an image"
        )
    for mu in MUS:
        mean, deviation = mean_and_deviation(summary["mu"][f"{mu:g}"])
        lines.append(f"64 px, noise scale 1, mu {mu:g}: {mean:.1f} ±{deviation:.1f}")
    return lines


EXPERIMENT = Experiment(
    title="noise scale, times and equal tokens at three resolutions",
    tools=[["tools/make_glyphs.py", "--resolution", str(size), "--output", f"runs/glyphs/{size}px"] for size in SIZES],
    tasks=tasks,
    summarise=summarise,
    draw=draw,
    describe=describe,
)
