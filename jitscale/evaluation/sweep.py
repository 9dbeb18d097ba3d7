"""Which guidance and which average is best: many settings measured on few images, the best of them on many.

The noise of an image is the same under every setting, so that differences between settings are much surer than the
distances themselves; and settings that differ in the guidance scale alone share the steps before guidance begins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from jitscale.config import Config, EvaluationConfig
from jitscale.errors import UserError
from jitscale.evaluation.distributed import Evaluator
from jitscale.model.jit import JiT

MOST_SCALES = 200
AXES = ("guidance", "ema", "interval")


@dataclass(frozen=True)
class Setting:
    """A weight set and how it is sampled from."""

    weights: str
    interval: tuple[float, float]
    scale: float

    def applied_to(self, evaluation: EvaluationConfig, num_images: int) -> EvaluationConfig:
        """The configuration with this setting."""
        return replace(
            evaluation,
            weights=self.weights,
            guidance_scale=self.scale,
            guidance_interval=list(self.interval),
            num_images=num_images,
        )


def settings_of(axes: Sequence[str], config: Config, weight_sets: Sequence[str]) -> list[Setting]:
    """Every combination of what the axes name, those of one network together.

    Args:
        axes: `guidance=1.0:4.0:0.1` (from, to, step) or `guidance=1,1.5`; `ema=all` or names with commas;
            `interval=0.1:1.0,0.2:0.8`. What is not named stays as configured.
        config: of the evaluation.
        weight_sets: those that there are.

    Raises:
        UserError: an unknown axis, weight set, or impossible numbers.
    """
    evaluation = config.evaluation
    low, high = evaluation.guidance_interval
    scales, names, intervals = [evaluation.guidance_scale], [evaluation.weights], [(low, high)]
    for text in axes:
        axis, equals, values = text.partition("=")
        if axis not in AXES or not equals or not values:
            raise UserError(f"--sweep {text}: write one of guidance=1.0:4.0:0.1, ema=all, interval=0.1:1.0,0.2:0.8")
        if axis == "guidance":
            scales = _scales(text, values)
        elif axis == "ema":
            names = list(weight_sets) if values == "all" else values.split(",")
        else:
            intervals = [_interval(text, part) for part in values.split(",")]
    unknown = [name for name in names if name not in weight_sets]
    if unknown:
        raise UserError(
            f"--sweep ema={','.join(names)}: no weight set {unknown[0]}; there are {', '.join(weight_sets)}"
        )
    unguided = evaluation.guide is None and (config.model.num_classes == 0 or config.diffusion.label_drop == 0)
    if unguided and any(scale != 1.0 for scale in scales):
        raise UserError("--sweep guidance: the network was trained with labels only, or with none; nothing guides it")
    return [
        Setting(name, interval, scale)
        for name in names
        for interval in intervals
        for scale in scales
        if scale != 1.0 or interval == intervals[0]  # without guidance there is no interval
    ]


def measure_settings(
    settings: Sequence[Setting],
    network: Callable[[str], JiT],
    evaluator: Evaluator,
    num_images: int,
    *,
    neighbours: bool = False,
) -> Iterator[dict[str, Any]]:
    """Results in the order of the settings, each with its `weights`, `scale` and `interval`; a collective call.

    Args:
        settings: those of one network together.
        network: gives the weight sets, on the device.
        evaluator: measures.
        num_images: of each.
        neighbours: see `Evaluator.measure`.
    """
    evaluation = evaluator.config.evaluation
    for weights, own in groupby(settings, key=lambda setting: setting.weights):
        model = network(weights)
        for _, together in groupby(own, key=lambda setting: setting.interval):
            group = list(together)
            configured = [setting.applied_to(evaluation, num_images) for setting in group]
            results = evaluator.measure(model, weights, configured, neighbours=neighbours)
            for setting, result in zip(group, results, strict=True):
                yield {**result, "weights": setting.weights, "scale": setting.scale, "interval": list(setting.interval)}


def _scales(text: str, values: str) -> list[float]:
    try:
        if ":" in values:
            low, high, step = (float(part) for part in values.split(":"))
            count = math.floor((high - low) / step + 1e-6) + 1
            found = [round(low + index * step, 9) for index in range(count)] if 0 < count <= MOST_SCALES else []
        else:
            found = [float(part) for part in values.split(",")]
    except (ValueError, ZeroDivisionError):
        found = []
    if not found or not all(0 <= scale < math.inf for scale in found):
        raise UserError(f"--sweep {text}: write FROM:TO:STEP or numbers with commas, {MOST_SCALES} at most")
    return list(dict.fromkeys(found))


def _interval(text: str, part: str) -> tuple[float, float]:
    try:
        low, high = (float(number) for number in part.split(":"))
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 <= low < high <= 1:
        raise UserError(f"--sweep {text}: {part} must be two times LOW:HIGH, 0 <= low < high <= 1")
    return low, high
