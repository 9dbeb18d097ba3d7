"""Does it pay to train at a low resolution, upgrade, and fine-tune? And which way of upgrading is best?

Letters at 32, 64 and 128 px, always 16 tokens, so an image costs about the same at each size. Compared are (a) the high
resolution from scratch, (b) upgraded and fine-tuned, (c) upgraded only, (d) low-resolution samples enlarged.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jitscale.figures import COLOURS, curve, figure, mean_and_deviation, plus_minus
from studies.run import Run, seeded
from studies.tasks import Outcomes, Shards, Summary, by_seed

SHARDS: Shards = [("glyphs", size) for size in (32, 64, 128)]
LOW, LONG, SCRATCH, TUNED, SHORT = 64_000, 128_000, 128_000, 32_000, 8_000  # images seen
DIVIDED = "optim.lr_factor_patch_embedding=0.25"
BASE = (DIVIDED, "optim.warmup_images=0")  # settings of fine-tuning; the default kernel is nearest
VARIANTS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "nearest": (BASE, {}),
    "smooth": (BASE, {"kernel": "smooth"}),
    "pi-bilinear": (BASE, {"kernel": "pi-bilinear"}),
    "pi-bicubic": (BASE, {"kernel": "pi-bicubic"}),
    "all moments reset": (BASE, {"keep_moments": False}),
    "patch lr not divided": (("optim.warmup_images=0",), {}),
    "patch lr not divided, warm-up": (("optim.warmup_images=3200",), {}),
    "patch lr divided, warm-up": ((DIVIDED, "optim.warmup_images=3200"), {}),
    "half the lr": ((*BASE, "optim.lr=1e-3"), {}),
    "EMA from the weights": ((*BASE, "run.init_ema=false"), {"as_initial": True}),
    "weights from the EMA": ((*BASE, "run.init_weights=ema_0.995"), {"as_initial": True}),
}


def tasks(seed: int) -> list[Run]:
    """All runs, each after the one that it starts from."""

    def run(what: str, size: int, images: int, settings: Sequence[str] = (), **options: Any) -> Run:
        return seeded(what, seed, f"glyphs_{size}.yaml", images, *settings, **options)

    def tuned(what: str, size: int, source: str) -> Run:
        return run(what, size, TUNED, BASE, after=f"{source}_s{seed}", measured_every=TUNED // 8)

    enlarged = ("evaluation.reference_size=64",)
    short: dict[str, Any] = {"after": f"low_s{seed}", "measured_every": SHORT // 2}
    return [
        run("low", 32, LOW, evaluation=enlarged),
        run("long", 32, LONG, evaluation=enlarged),
        run("scratch_64", 64, SCRATCH, measured_every=SCRATCH // 8),
        tuned("tuned_64", 64, "low"),
        tuned("tuned_long_64", 64, "long"),
        *(run(name.replace(" ", "_"), 64, SHORT, own, **short, **more) for name, (own, more) in VARIANTS.items()),
        run("scratch_128", 128, SCRATCH, measured_every=SCRATCH // 8),
        tuned("tuned_128", 128, "tuned_long_64"),
    ]


def summarise(outcomes: Outcomes) -> Summary:
    """Distances by run and seed over images seen, cost an image, and the share of scratch's compute."""
    names = ["low", "long", "scratch_64", "tuned_64", "tuned_long_64", "scratch_128", "tuned_128"]
    curves = {name: _curve(by_seed(outcomes, name)) for name in names}
    return {
        "curves": curves,
        "variants": {name: _curve(by_seed(outcomes, name.replace(" ", "_"))) for name in VARIANTS},
        "floor": outcomes["scratch_64_s0"]["measurements"][0]["fid_floor"],
        "share_of_scratch": {
            name: _share(curves[name], curves[f"scratch_{name.rpartition('_')[2]}"])
            for name in ("tuned_64", "tuned_long_64", "tuned_128")
        },
    }


def _curve(outcomes: Sequence[Any]) -> dict[str, Any]:
    measured = [outcome["measurements"] for outcome in outcomes]
    return {
        "images": [m["images"] for m in measured[0]],
        **{key: [[m[key] for m in seed] for seed in measured] for key in ("fid", "label_agreement")},
        "flops_an_image": outcomes[0]["flops_an_image"],
        "training_seconds": [outcome["training_seconds"] for outcome in outcomes],
    }


def _share(tuned: Mapping[str, Any], scratch: Mapping[str, Any]) -> list[float | None]:
    """By seed, the share of scratch's compute after which fine-tuning has scratch's final distance; None: never."""
    shares: list[float | None] = []
    for own, reference in zip(tuned["fid"], scratch["fid"], strict=False):  # seeds that both have
        reached = [images for images, fid in zip(tuned["images"], own, strict=True) if fid <= reference[-1]]
        cost = tuned["flops_an_image"] / (scratch["flops_an_image"] * scratch["images"][-1])
        shares.append(reached[0] * cost if reached else None)
    return shares


def draw(summary: Summary, path: Path) -> None:
    """FID over compute at 64 and 128 px, and the variants after SHORT images."""
    curves = summary["curves"]

    def compute(name: str, *before: str) -> list[float]:
        spent = sum(float(curves[low]["images"][-1] * curves[low]["flops_an_image"]) for low in before)
        return [(spent + images * curves[name]["flops_an_image"]) / 1e12 for images in curves[name]["images"]]

    with figure(path, "AB;CC") as (at_64, at_128, variants):
        for axis, size, tuned in (
            (at_64, 64, {"tuned_64": ("low",), "tuned_long_64": ("long",)}),
            (at_128, 128, {"tuned_128": ("long", "tuned_long_64")}),
        ):
            scratch = f"scratch_{size}"
            curve(axis, compute(scratch), curves[scratch]["fid"], "from scratch")
            for number, (name, before) in enumerate(tuned.items(), start=1):
                low = "from 64 px" if size == 128 else f"after {curves[before[0]]['images'][-1] // 1000}k at 32 px"
                fid = curves[name]["fid"]
                curve(axis, compute(name), fid, f"upgraded {low}", number)
                counted: Any = {"linestyle": ":", "alpha": 0.7}
                curve(axis, compute(name, *before), fid, "  the low resolution counted", number, **counted)
            axis.set(xlabel="training compute (TFLOP)", ylabel="glyphs-FID", yscale="log", title=f"{size} x {size}")
            axis.legend()
        names = list(VARIANTS)[::-1]
        ends = [[seed[-1] for seed in summary["variants"][name]["fid"]] for name in names]
        base = np.array(ends[names.index("nearest")])
        means, deviations = zip(*(mean_and_deviation(np.array(end) - base[: len(end)]) for end in ends), strict=True)
        variants.errorbar(means, range(len(names)), xerr=deviations, fmt="o", capsize=2, color=COLOURS[0])
        variants.axvline(0, color="black", linewidth=0.8)
        variants.set_yticks(range(len(names)), names)
        variants.set(xlabel=f"FID after {SHORT // 1000}k images, minus nearest's", title="Variants, 64 x 64")


def describe(summary: Summary) -> list[str]:
    """Means and deviations over seeds, as a table."""
    lines = [f"{'':32}{'images':>9}{'glyphs-FID':>16}{'as asked':>10}"]
    rows = [*summary["curves"].items(), *((f"  {name}", found) for name, found in summary["variants"].items())]
    for name, found in rows:
        for at in sorted({0, len(found["images"]) - 1}):
            distance = plus_minus([seed[at] for seed in found["fid"]], 10)
            asked = np.mean([seed[at] for seed in found["label_agreement"]])
            lines.append(f"{name:32}{found['images'][at]:9}{distance}{asked:10.1%}")
    lines.append(f"half of the real images against the other: {summary['floor']:.2f}")
    for name, shares in summary["share_of_scratch"].items():
        words = ["never" if share is None else f"{share:.0%}" for share in shares]
        lines.append(f"{name} reaches the final distance of scratch with {', '.join(words)} of its compute")
    return lines
