"""Does it pay to train at a low resolution, upgrade, and fine-tune? And which way of upgrading is best?

Glyphs at 32, 64 and 128 px, 16 tokens at each, so that an image costs about the same everywhere. Compared are (a) the
high resolution from scratch, (b) upgraded and fine-tuned, (c) upgraded only, (d) low-resolution samples enlarged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jitscale.figures import COLOURS, MARKERS, curve, figure, mean_and_deviation
from studies.run import Run
from studies.tasks import Experiment, Outcomes, by_seed

LOW, LONG, SCRATCH, TUNED, SHORT = 64_000, 128_000, 128_000, 32_000, 8_000  # images seen
BASE = (
    "optim.lr_factor_patch_embedding=0.25",
    "optim.warmup_images=0",
)  # of fine-tuning, with the kernel nearest, if nothing else is said
VARIANTS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "nearest": (BASE, {}),
    "smooth": (BASE, {"kernel": "smooth"}),
    "pi-bilinear": (BASE, {"kernel": "pi-bilinear"}),
    "pi-bicubic": (BASE, {"kernel": "pi-bicubic"}),
    "all moments reset": (BASE, {"keep_moments": False}),
    "patch lr not divided": (("optim.warmup_images=0",), {}),
    "patch lr not divided, warm-up": (("optim.warmup_images=3200",), {}),
    "patch lr divided, warm-up": ((BASE[0], "optim.warmup_images=3200"), {}),
    "half the lr": ((*BASE, "optim.lr=1e-3"), {}),
    "EMA from the weights": ((*BASE, "run.init_ema=false"), {"as_initial": True}),
    "weights from the EMA": ((*BASE, "run.init_weights=ema_0.995"), {"as_initial": True}),
}


def tasks(seeds: int) -> Sequence[Run]:
    """All runs, those of a seed together."""
    found = []
    for seed in range(seeds):
        own = (f"run.seed={seed}", f"evaluation.seed={seed}")
        enlarged = ("evaluation.reference_size=64",)
        found += [
            Run(f"low_s{seed}", "glyphs_32.yaml", (*own, f"run.max_images={LOW}"), evaluation=enlarged),
            Run(f"long_s{seed}", "glyphs_32.yaml", (*own, f"run.max_images={LONG}"), evaluation=enlarged),
            _scratch(64, own, seed),
            _tuned("tuned_64", 64, own, seed, f"low_s{seed}"),
            _tuned("tuned_long_64", 64, own, seed, f"long_s{seed}"),
            *_variants(own, seed),
            _scratch(128, own, seed),
            _tuned("tuned_128", 128, own, seed, f"tuned_long_64_s{seed}"),
        ]
    return found


def _scratch(size: int, own: Sequence[str], seed: int) -> Run:
    settings = (*own, f"run.max_images={SCRATCH}")
    return Run(f"scratch_{size}_s{seed}", f"glyphs_{size}.yaml", settings, measured_every=SCRATCH // 8)


def _tuned(name: str, size: int, own: Sequence[str], seed: int, source: str) -> Run:
    settings = (*own, *BASE, f"run.max_images={TUNED}")
    return Run(f"{name}_s{seed}", f"glyphs_{size}.yaml", settings, source, measured_every=TUNED // 8)


def _variants(own: Sequence[str], seed: int) -> list[Run]:
    return [
        Run(
            f"{name.replace(' ', '_')}_s{seed}",
            "glyphs_64.yaml",
            (*own, *settings, f"run.max_images={SHORT}"),
            f"low_s{seed}",
            measured_every=SHORT // 2,
            **options,
        )
        for name, (settings, options) in VARIANTS.items()
    ]


def summarise(outcomes: Outcomes) -> dict[str, Any]:
    """Distances by run and seed over images seen, cost an image, and what the claim comes to."""
    names = ["low", "long", "scratch_64", "tuned_64", "tuned_long_64", "scratch_128", "tuned_128"]
    curves = {name: _curve(by_seed(outcomes, name)) for name in names}
    variants = {name: _curve(by_seed(outcomes, name.replace(" ", "_"))) for name in VARIANTS}
    return {
        "curves": curves,
        "variants": variants,
        "floor": outcomes["scratch_64_s0"]["measurements"][0]["fid_floor"],
        "share_of_scratch": {
            name: _share(curves[name], curves[reference])
            for name, reference in (
                ("tuned_64", "scratch_64"),
                ("tuned_long_64", "scratch_64"),
                ("tuned_128", "scratch_128"),
            )
        },
    }


def _curve(outcomes: Sequence[Any]) -> dict[str, Any]:
    return {
        "images": [m["images"] for m in outcomes[0]["measurements"]],
        "fid": [[m["fid"] for m in outcome["measurements"]] for outcome in outcomes],
        "label_agreement": [[m["label_agreement"] for m in outcome["measurements"]] for outcome in outcomes],
        "flops_an_image": outcomes[0]["flops_an_image"],
        "training_seconds": [outcome["training_seconds"] for outcome in outcomes],
    }


def _share(tuned: Mapping[str, Any], scratch: Mapping[str, Any]) -> list[float | None]:
    """Compute of fine-tuning over that of scratch with which each seed reaches scratch's final distance, or None."""
    shares: list[float | None] = []
    for own, reference in zip(tuned["fid"], scratch["fid"], strict=False):  # seeds that both have
        reached = [images for images, fid in zip(tuned["images"], own, strict=True) if fid <= reference[-1]]
        cost = tuned["flops_an_image"] / (scratch["flops_an_image"] * scratch["images"][-1])
        shares.append(reached[0] * cost if reached else None)
    return shares


def draw(summary: Mapping[str, Any], path: Path) -> None:
    """FID over compute at 64 and 128 px, and the variants after SHORT images."""
    curves = summary["curves"]

    def compute(name: str, before: float = 0.0) -> list[float]:
        found = curves[name]
        return [(before + images * found["flops_an_image"]) / 1e12 for images in found["images"]]

    def cost(name: str) -> float:
        return float(curves[name]["images"][-1] * curves[name]["flops_an_image"])

    with figure(path, panels=3) as (at_64, at_128, variants):
        for axis, size, tuned, before in (
            (at_64, 64, {"tuned_64": "low", "tuned_long_64": "long"}, {"low": cost("low"), "long": cost("long")}),
            (at_128, 128, {"tuned_128": "tuned_long_64"}, {"tuned_long_64": cost("long") + cost("tuned_long_64")}),
        ):
            scratch = f"scratch_{size}"
            curve(axis, compute(scratch), curves[scratch]["fid"], "from scratch", marker="o", color=COLOURS[0])
            for number, (name, source) in enumerate(tuned.items(), start=1):
                low = "64 px" if size == 128 else f"{curves[source]['images'][-1] // 1000}k images at 32 px"
                style = {"marker": MARKERS[number], "color": COLOURS[number]}
                curve(axis, compute(name), curves[name]["fid"], f"upgraded from {low}", **style)
                counted = {**style, "linestyle": ":", "alpha": 0.7}
                curve(
                    axis, compute(name, before[source]), curves[name]["fid"], "  the low resolution counted", **counted
                )
            axis.set(xlabel="training compute (TFLOP)", ylabel="glyphs-FID", yscale="log", title=f"{size} x {size}")
            axis.legend(fontsize=7)
        names = list(VARIANTS)[::-1]
        ends = [[seed[-1] for seed in summary["variants"][name]["fid"]] for name in names]
        base = np.array(ends[names.index("nearest")])
        differences = [mean_and_deviation(np.array(end) - base[: len(end)]) for end in ends]
        variants.errorbar(
            [mean for mean, _ in differences],
            range(len(names)),
            xerr=[deviation for _, deviation in differences],
            fmt="o",
            capsize=2,
            color=COLOURS[0],
        )
        variants.axvline(0, color="black", linewidth=0.8)
        variants.set_yticks(range(len(names)), names)
        variants.set(xlabel=f"FID after {SHORT // 1000}k images, minus nearest's", title="Variants, 64 x 64")


def describe(summary: Mapping[str, Any]) -> list[str]:
    """Means and deviations over seeds, as a table."""
    lines = [f"{'':32}{'images':>9}{'glyphs-FID':>16}{'as asked':>10}"]
    rows = [*summary["curves"].items(), *((f"  {name}", found) for name, found in summary["variants"].items())]
    for name, found in rows:
        for at in sorted({0, len(found["images"]) - 1}):
            mean, deviation = mean_and_deviation([seed[at] for seed in found["fid"]])
            asked = np.mean([seed[at] for seed in found["label_agreement"]])
            lines.append(f"{name:32}{found['images'][at]:9}{mean:10.2f} ±{deviation:4.2f}{asked:10.1%}")
    lines.append(f"half of the real images against the other: {summary['floor']:.2f}")
    for name, shares in summary["share_of_scratch"].items():
        words = ["never" if share is None else f"{share:.0%}" for share in shares]
        lines.append(f"{name} reaches the final distance of scratch with {', '.join(words)} of its compute")
    return lines


EXPERIMENT = Experiment(
    title="low to high resolution: from scratch against upgraded and fine-tuned",
    tools=[
        ["tools/make_glyphs.py", "--resolution", str(size), "--output", f"runs/glyphs/{size}px"]
        for size in (32, 64, 128)
    ],
    tasks=tasks,
    summarise=summarise,
    draw=draw,
    describe=describe,
)
