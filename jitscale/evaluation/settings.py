"""Settings that an evaluation tries: weight sets, guidance scales and intervals, as text names them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jitscale.config import Config, EvaluationConfig
from jitscale.errors import ConfigError

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
        return replace(evaluation, num_images=num_images, **self.as_dict())

    def as_dict(self) -> dict[str, Any]:
        """By the names of the configuration."""
        return {"weights": self.weights, "guidance_scale": self.scale, "guidance_interval": list(self.interval)}


def sweep_images(evaluation: EvaluationConfig) -> int:
    """Images of each setting of a sweep: no more than the best one is measured on."""
    return min(evaluation.sweep_images, evaluation.num_images)


def final_settings(config: Config, weight_sets: Sequence[str]) -> list[Setting]:
    """What the final evaluation tries: `settings_of` the configured axes."""
    return settings_of(config.evaluation.sweep or [], config, weight_sets)


def settings_of(axes: Sequence[str], config: Config, weight_sets: Sequence[str]) -> list[Setting]:
    """Every combination of what the axes name, those of one network together.

    Axes are `guidance=1.0:4.0:0.1` (from, to, step) or `guidance=1,1.5`; `ema=all`, `ema=averages` (all but `model`) or
    names with commas; `interval=0.1:1.0,0.2:0.8`. What is not named stays as configured.

    Raises:
        ConfigError: an unknown axis or weight set, or impossible numbers.
    """
    evaluation = config.evaluation
    low, high = evaluation.guidance_interval
    scales, names, intervals = [evaluation.guidance_scale], [evaluation.weights], [(low, high)]
    for text in axes:
        axis, _, values = text.partition("=")
        if axis not in AXES or not values:
            raise _mistake(text, "write one of guidance=1.0:4.0:0.1, ema=averages, interval=0.1:1.0,0.2:0.8")
        if axis == "guidance":
            scales = _scales(text, values)
        elif axis == "interval":
            intervals = [_interval(text, part) for part in values.split(",")]
        elif values == "all":
            names = list(weight_sets)
        elif values == "averages":
            names = [name for name in weight_sets if name != "model"] or list(weight_sets)
        else:
            names = values.split(",")
    for name in names:
        if name not in weight_sets:
            raise _mistake(f"ema={','.join(names)}", f"no weight set {name}; there are {', '.join(weight_sets)}")
    unguided = evaluation.guide is None and (config.model.num_classes == 0 or config.diffusion.label_drop == 0)
    if unguided and any(scale != 1.0 for scale in scales):
        remedy = "so that nothing guides it; leave the axis out"
        raise _mistake("guidance", f"the network is trained with labels only, or with none, {remedy}")
    return [
        Setting(name, interval, scale)
        for name in names
        for interval in intervals
        for scale in scales
        if scale != 1.0 or interval == intervals[0]  # without guidance there is no interval
    ]


def _mistake(text: str, fault: str) -> ConfigError:
    return ConfigError(f"evaluation.sweep: {text}: {fault}")


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
        raise _mistake(text, f"write FROM:TO:STEP or numbers with commas, {MOST_SCALES} at most")
    return list(dict.fromkeys(found))


def _interval(text: str, part: str) -> tuple[float, float]:
    try:
        low, high = (float(number) for number in part.split(":"))
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 <= low < high <= 1:
        raise _mistake(text, f"{part} must be two times LOW:HIGH, 0 <= low < high <= 1")
    return low, high
