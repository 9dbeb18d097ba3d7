"""Resolution: the same noise is weaker on larger images; the same number of tokens costs about the same.

An image with k times the pixels a side is pooled to the small size. That divides the standard deviation of white noise
by k and adds 2 log k to the logarithm of the signal-to-noise ratio (simple diffusion, Hoogeboom et al. 2023, arXiv
2301.11093). So the noise scale is multiplied by k, or the times are shifted. Letters, 16 tokens at every resolution.
"""

from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from jitscale.figures import COLOURS, UNCONNECTED, curve_over, figure, plus_minus
from jitscale.preparation.glyphs import Glyphs
from studies.run import Run, seeded
from studies.tasks import Outcomes, Shards, Summary, by_seed, ends

SIZES = (32, 64, 128)
SHARDS: Shards = [("glyphs", size) for size in SIZES]
MUS = (0.0, -0.8, -1.6)
DEFAULT_MU = -0.8
IMAGES = 24_000
SHOWN_TIME = 0.4
GLYPH = 3


def tasks(seed: int) -> list[Run]:
    """Every resolution with and without its noise scale, and two other means of the times."""

    def run(what: str, size: int, *settings: str) -> Run:
        return seeded(what, seed, f"glyphs_{size}.yaml", IMAGES, "optim.warmup_images=1600", *settings)

    unscaled = "diffusion.noise_scale=1.0"
    return [
        *(run(f"scaled_{size}", size) for size in SIZES),
        *(run(f"unscaled_{size}", size, unscaled) for size in SIZES[1:]),
        *(run(f"mu_{mu:g}", 64, unscaled, f"diffusion.mu={mu}") for mu in MUS if mu != DEFAULT_MU),
    ]


def summarise(outcomes: Outcomes) -> Summary:
    """Distances and seconds by run and seed."""
    fid = partial(ends, outcomes, key="fid")
    scaled = {str(size): by_seed(outcomes, f"scaled_{size}") for size in SIZES}
    return {
        "images": IMAGES,
        "scaled": {size: fid(f"scaled_{size}") for size in scaled},
        "unscaled": {"32": fid("scaled_32"), **{str(size): fid(f"unscaled_{size}") for size in SIZES[1:]}},
        "mu": {f"{mu:g}": fid("unscaled_64" if mu == DEFAULT_MU else f"mu_{mu:g}") for mu in MUS},
        "floor": {size: ends(outcomes, f"scaled_{size}", "fid_floor")[0] for size in scaled},
        "training_seconds": {size: [run["training_seconds"] for run in runs] for size, runs in scaled.items()},
        "flops_an_image": {size: runs[0]["flops_an_image"] for size, runs in scaled.items()},
    }


def noisy(size: int, noise_scale: float) -> Any:
    """A glyph at SHOWN_TIME, pooled to the smallest size: (32, 32, 3) in [0, 1]."""
    image = torch.from_numpy(np.asarray(Glyphs(GLYPH + 1, size)[GLYPH])).permute(2, 0, 1)[None] / 127.5 - 1
    noise = noise_scale * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    pooled = F.avg_pool2d(SHOWN_TIME * image + (1 - SHOWN_TIME) * noise, size // SIZES[0])
    return (pooled[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1).numpy()


def draw(summary: Summary, path: Path) -> None:
    """Noise after pooling; log SNR; distances with and without the noise scale; distances over mu."""
    with figure(path, panels=2, rows=2) as (seen, ratio, scales, means):
        rows = [[noisy(size, 1.0) for size in SIZES], [noisy(size, size / SIZES[0]) for size in SIZES]]
        seen.imshow(np.concatenate([np.concatenate(row, 1) for row in rows]), interpolation="nearest")
        seen.set_yticks([16, 48], ["scale 1", "scale k"])
        seen.set_xticks([16, 48, 80], [f"{size} px" for size in SIZES])
        seen.grid(visible=False)
        seen.set_title(f"t = {SHOWN_TIME}, pooled to 32 px")
        t = np.linspace(0.02, 0.98, 97)
        for number, size in enumerate(SIZES):
            log_snr = 2 * np.log(t / (1 - t)) + 2 * np.log(size / SIZES[0])
            ratio.plot(t, log_snr, color=COLOURS[number], label=f"{size} px, scale 1")
        ratio.set(xlabel="t", ylabel="log SNR after pooling to 32 px")
        ratio.legend()
        for number, (key, label) in enumerate((("scaled", "noise scale k"), ("unscaled", "noise scale 1"))):
            curve_over(scales, {size: summary[key][str(size)] for size in SIZES}, label, number)
        scales.set_xticks(SIZES)
        scales.set(xlabel="pixels a side", ylabel="glyphs-FID", yscale="log")
        scales.legend()
        curve_over(means, {mu: summary["mu"][f"{mu:g}"] for mu in MUS}, "64 px, noise scale 1", 1)
        curve_over(means, {DEFAULT_MU: summary["scaled"]["64"]}, "64 px, scale 2", **UNCONNECTED)
        means.set_xticks(MUS)
        means.set(xlabel="mean of the times' logits, mu", ylabel="glyphs-FID")
        means.legend()


def describe(summary: Summary) -> list[str]:
    """Distances, and the cost of an image."""
    lines = [f"glyphs-FID after {summary['images']:,} images"]
    for size in SIZES:
        scaled, unscaled = (plus_minus(summary[key][str(size)], 7, 1) for key in ("scaled", "unscaled"))
        floor, mflop = summary["floor"][str(size)], summary["flops_an_image"][str(size)] / 1e6
        ms = 1e3 * fmean(summary["training_seconds"][str(size)]) / summary["images"]
        distances = f"noise scale {size // SIZES[0]}: {scaled}, noise scale 1: {unscaled}; floor {floor:.2f}"
        lines.append(f"{size:4} px: {distances}; {mflop:.0f} MFLOP and {ms:.2f} ms an image")
    for mu in MUS:
        lines.append(f"64 px, noise scale 1, mu {mu:g}: {plus_minus(summary['mu'][f'{mu:g}'], digits=1)}")
    return lines
