"""The points of a sweep over weight sets, guidance scales and intervals, from the texts of `evaluation.sweep`."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby, product

from jitscale.config import Config, EvaluationConfig
from jitscale.errors import ConfigError

SweepPoint = EvaluationConfig  # one combination of settings, with the number of images

MOST_SCALES = 200
AXES = ("guidance", "ema", "interval", "internal", "internal_interval")
# The settings that the axes change.
TRIED = ("weights", "guidance_scale", "guidance_interval", "internal_guidance", "internal_interval")


def sweep_images(evaluation: EvaluationConfig) -> int:
    """The number of images of each point of a sweep; at most `evaluation.num_images`."""
    return min(evaluation.sweep_images, evaluation.num_images)


def images_of(points: Sequence[SweepPoint]) -> int:
    """Images whose features a final evaluation keeps: few for each of `points`, and more for the best ones."""
    if not points:
        return 0
    evaluation, few = points[0], sweep_images(points[0])
    best = min(evaluation.sweep_keep, len(points))
    return len(points) * few + best * (evaluation.num_images - few)


def sharing_steps(points: Iterable[SweepPoint]) -> Iterator[list[SweepPoint]]:
    """Groups of adjacent points that differ only in the guidance scale; they share the steps before guidance begins."""
    for _, together in groupby(points, key=lambda point: replace(point, guidance_scale=1.0)):
        yield list(together)


def sweep_points(config: Config, weight_sets: Sequence[str]) -> list[SweepPoint]:
    """The points of the final evaluation: all combinations of the axes in `evaluation.sweep`.

    They are ordered by weight set, then by interval. Axes are `guidance=1.0:4.0:0.1` (from, to, step) or
    `guidance=1,1.5`; `ema=all`, `ema=averages` (all except `model`) or names with commas; `interval=0.1:1.0,0.2:0.8`;
    `internal` and `internal_interval` in the same form, for internal guidance. Other settings stay as configured.
    Raises a ConfigError at an unknown axis or weight set, impossible numbers, or guidance that the network does not
    support.
    """
    evaluation = config.evaluation
    scales, names, intervals = [evaluation.guidance_scale], [evaluation.weights], [evaluation.guidance_interval]
    internal, internal_intervals = [evaluation.internal_guidance], [evaluation.internal_interval]
    for text in evaluation.sweep or []:
        axis, _, values = text.partition("=")
        if axis not in AXES or not values:
            examples = "guidance=1.0:4.0:0.1, ema=averages, interval=0.1:1.0,0.2:0.8, internal=1:2:0.2"
            raise _mistake(text, f"write one of {examples}, internal_interval=0:1,0:0.8")
        if axis == "guidance":
            scales = _scales(text, values)
        elif axis == "interval":
            intervals = [_interval(text, part) for part in values.split(",")]
        elif axis == "internal":
            internal = _scales(text, values)
        elif axis == "internal_interval":
            internal_intervals = [_interval(text, part) for part in values.split(",")]
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
        raise _mistake(
            "guidance",
            "a network that was always or never trained with labels cannot be guided; remove this axis",
        )
    if config.model.middle_head == 0 and any(scale != 1.0 for scale in internal):
        raise _mistake("internal", "the network has no middle output layer (model.middle_head=0); remove this axis")
    return [
        replace(
            evaluation,
            weights=name,
            guidance_interval=interval,
            internal_interval=internal_interval,
            internal_guidance=inner,
            guidance_scale=scale,
        )
        # Scales vary fastest, so that points that share steps are adjacent. Without guidance, one interval is enough.
        for name, interval, internal_interval, inner in product(names, intervals, internal_intervals, internal)
        for scale in scales
        if scale != 1.0 or interval == intervals[0]
        if inner != 1.0 or internal_interval == internal_intervals[0]
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
    except (ValueError, ArithmeticError):
        found = []
    if not found or not all(0 <= scale < math.inf for scale in found):
        raise _mistake(text, f"write FROM:TO:STEP or numbers with commas, at most {MOST_SCALES}")
    return list(dict.fromkeys(found))


def _interval(text: str, part: str) -> list[float]:
    try:
        low, high = (float(number) for number in part.split(":"))
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 <= low < high <= 1:
        raise _mistake(text, f"{part} must be two times LOW:HIGH, 0 <= low < high <= 1")
    return [low, high]
