"""Time the metrics of an evaluation, from features that were computed before."""

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.measuring import CPU, Stopwatch, Table, peak_memory_mib
from jitscale.evaluation import metrics
from jitscale.evaluation.evaluator import MOST_NEIGHBOURS
from jitscale.evaluation.inception import Inception


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each metric for random features of Inception's widths: `options.images` real and as many generated."""
    normal = np.random.default_rng(0).standard_normal
    widths = (Inception.num_features, Inception.num_features, Inception.num_logits, Inception.num_spatial)
    real, generated, logits, spatial = (normal((options.images, width), np.float32) for width in widths)
    distance = metrics.FrechetDistance(Inception.num_features)
    distance.update(real, real=True)

    def fid() -> None:
        distance.update(generated, real=False)
        distance.compute()

    few = slice(0, MOST_NEIGHBOURS)
    computations: dict[str, Callable[[], Any]] = {
        "fid": fid,
        "sfid": lambda: metrics.frechet_distance(spatial, spatial),
        "inception_score": lambda: metrics.inception_score(logits),
        "kid": lambda: metrics.kernel_distance(real, generated),
        "precision and recall": lambda: metrics.precision_recall(real[few], generated[few]),
    }
    watch = Stopwatch(CPU)
    for name, compute in tqdm(computations.items(), unit="metric", desc="measure", disable=None):
        with watch.part(name):
            compute()
    return {"seconds": watch.medians(), "peak_memory_mib": peak_memory_mib()}


def describe(result: dict[str, Any]) -> Table:
    """The lines of the table of `measure`."""
    return [*((name, f"{value:.1f} s") for name, value in result["seconds"].items()), ("images", f"{result['images']}")]
