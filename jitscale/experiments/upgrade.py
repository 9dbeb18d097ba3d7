"""Does it pay to train at a low resolution, upgrade, and fine-tune? And which way of upgrading is best?

Glyphs at 32, 64 and 128 px, 16 tokens at each, so that an image costs the same everywhere. Compared at equal images seen:
(a) the high resolution from scratch, (b) upgraded and fine-tuned, (c) upgraded only, (d) low-resolution samples,
enlarged by the feature network.
"""

from __future__ import annotations

from collections.abc import Sequence

from jitscale.experiments.running import Run

LOW, SCRATCH, TUNED, SHORT = 64_000, 128_000, 32_000, 8_000  # images seen
BASE = ("optim.lr_factor_patch_embedding=0.25", "optim.warmup_images=0")  # of fine-tuning, if nothing else is said
VARIANTS: dict[str, tuple[tuple[str, ...], dict[str, object]]] = {
    "as recommended": (BASE, {}),
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


def runs(seeds: int) -> Sequence[Run]:
    """All runs, those of a seed together."""
    found = []
    for seed in range(seeds):
        own = (f"run.seed={seed}", f"evaluation.seed={seed}")
        found += [
            Run(
                f"low_s{seed}",
                "glyphs_32.yaml",
                (*own, f"run.max_images={LOW}"),
                evaluation=("evaluation.reference_size=64",),
            ),
            *_at_64(own, seed),
            *_at_128(own, seed),
        ]
    return found


def _at_64(own: tuple[str, ...], seed: int) -> list[Run]:
    low = f"low_s{seed}"
    high = "glyphs_64.yaml"
    variants = [
        Run(
            f"{name.replace(' ', '_')}_s{seed}",
            high,
            (*own, *settings, f"run.max_images={SHORT}"),
            upgraded_from=low,
            measured_every=SHORT // 2,
            **options,  # type: ignore[arg-type]
        )
        for name, (settings, options) in VARIANTS.items()
    ]
    return [
        Run(f"tuned_64_s{seed}", high, (*own, *BASE, f"run.max_images={TUNED}"), low, measured_every=TUNED // 8),
        Run(f"scratch_64_s{seed}", high, (*own, f"run.max_images={SCRATCH}"), measured_every=SCRATCH // 8),
        *variants,
    ]


def _at_128(own: tuple[str, ...], seed: int) -> list[Run]:
    high = "glyphs_128.yaml"
    tuned = (*own, *BASE, f"run.max_images={TUNED}")
    return [
        Run(f"tuned_128_s{seed}", high, tuned, f"tuned_64_s{seed}", measured_every=TUNED // 8),
        Run(f"scratch_128_s{seed}", high, (*own, f"run.max_images={SCRATCH}"), measured_every=SCRATCH // 8),
    ]
