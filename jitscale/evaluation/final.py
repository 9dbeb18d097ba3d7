"""The final evaluation of a run: a sweep on few images, then the best points on all images, and one result file.

An image has the same noise at every point, so that differences between points are much more certain than the distances
themselves. Points that differ only in the guidance scale share the steps before guidance begins.

RUN/results/<network>_<images>_<hash>.json   every measurement, by its protocol
RUN/result.json                              the measurement that the run's config.yaml requests, in the same form
RUN/sweep.svg                                its figure; figures of other measurements are in results/
"""

import gc
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from jitscale import parallel
from jitscale.addresses import masked
from jitscale.config import AUTO, Config, load_config
from jitscale.data.remote import is_remote
from jitscale.errors import data_error
from jitscale.evaluation.blocks import digest_of
from jitscale.evaluation.evaluator import Evaluator
from jitscale.evaluation.report import draw_sweep
from jitscale.evaluation.sweep import TRIED, SweepPoint, sharing_steps, sweep_images, sweep_points
from jitscale.files import atomic_write
from jitscale.model.jit import JiT
from jitscale.parallel import World
from jitscale.tracking import distance_of

logger = logging.getLogger(__name__)

Measured = tuple[SweepPoint, dict[str, Any]]  # a point and its metrics

# Settings of `evaluation` that do not change the final evaluation.
_ELSEWHERE = (
    *("at_end", "every_images", "few_images", "grid_every_images", "held_out_every_images"),
    *("cache_dir", "features_dir", "cuda_graphs", "sweep_max_share"),
)


def measure_points(
    points: Sequence[SweepPoint], network: Callable[[str], JiT], evaluator: Evaluator, *, neighbours: bool
) -> list[Measured]:
    """Each point with its metrics from `Evaluator.measure`, in the same order; a collective call.

    Points with the same weight set must be adjacent. `network` loads a weight set onto the device.
    """
    measured: list[Measured] = []
    for weights, own in groupby(points, key=lambda point: point.weights):
        model = network(weights)
        for group in sharing_steps(own):
            measured += zip(group, evaluator.measure(model, group, neighbours=neighbours), strict=True)
        # Freed before the next network is built, because two large networks may not fit besides an engine. Prepared
        # blocks are reference cycles, so that only the garbage collector frees them.
        del model
        gc.collect()
    return measured


def evaluate_model(model: JiT, weights: str, config: Config, world: World, run_dir: Path) -> dict[str, Any]:
    """`run_evaluation` of only the weight set `weights`, with the configured sampling; a collective call.

    `model` comes from `ready_on_all_ranks`, with the same weights on every rank. Raises what `Evaluator` and
    `run_evaluation` raise. It does not write result.json, which is for the run's own weights.
    """
    alone = replace(config, evaluation=replace(config.evaluation, weights=weights, sweep=None))
    evaluator = Evaluator(alone, world, run_dir)
    return run_evaluation(lambda name: model, sweep_points(alone, [weights]), evaluator, run_dir, is_end=False)


def run_evaluation(
    network: Callable[[str], JiT], points: Sequence[SweepPoint], evaluator: Evaluator, run_dir: Path, *, is_end: bool
) -> dict[str, Any]:
    """Try `points` on few images, measure the best ones on all images, and write the result; a collective call.

    `network` returns the network of a weight set by its name, ready to sample, on the device. `points` come from
    `sweep_points`. `is_end` is true if these are the final weights of the run in `run_dir`, or if there is no run.

    Returns on every rank the metrics of the best point (see `Evaluator.measure`), with `best` (that point) and `table`
    (a row for every measurement: the sweep, then the best points on `evaluation.num_images`). Raises a DataError if the
    result cannot be written, a UserError at an image with values that are not finite.
    """
    evaluation = evaluator.config.evaluation
    few, chosen = sweep_images(evaluation), points
    coarse: list[Measured] = []
    if len(points) > 1:
        if evaluator.world.is_main:
            logger.info("sweep: %d settings, %d images each", len(points), few)
        tried = [replace(point, num_images=few) for point in points]
        coarse = measure_points(tried, network, evaluator, neighbours=False)
        best = sorted(range(len(points)), key=lambda index: _distance(coarse[index]))[: evaluation.sweep_keep]
        chosen = [points[index] for index in sorted(best)]  # in the order of `points`: weight sets stay adjacent
    precise = sorted(measure_points(chosen, network, evaluator, neighbours=True), key=_distance)
    # If the sweep has the same number of images, the table already holds the best points.
    rows = coarse if coarse and few == evaluation.num_images else [*coarse, *precise]
    said = ("num_images", distance_of(precise[0][1]), "inception_score")
    table = [{**_tried(point), **{key: metrics[key] for key in said if key in metrics}} for point, metrics in rows]
    point, metrics = precise[0]
    result = {"best": _tried(point), **metrics, "table": table}
    parallel.on_main(lambda: _write_result(run_dir, result, evaluator.config, is_end=is_end))
    return result


def _tried(point: SweepPoint) -> dict[str, Any]:
    return {name: getattr(point, name) for name in TRIED}


def _distance(measured: Measured) -> float:
    return float(measured[1][distance_of(measured[1])])


def _write_result(run_dir: Path, result: dict[str, Any], config: Config, *, is_end: bool) -> None:
    """Write `result` to results/, and to result.json if it is the final evaluation of the run.

    Raises a DataError if it cannot be written; the features stay in the blocks.
    """
    paths = [run_dir / "results" / f"{_name(result)}.json"]
    if is_end and is_configured_end(run_dir, config):
        paths.append(run_dir / "result.json")
    for path in paths:
        with data_error(f"{path}: cannot be written", "make room and repeat the command: no image is made twice"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as file:
                file.write(json.dumps(result, indent=2).encode())
            if len(result["table"]) > 1:
                draw_sweep(result, path.with_suffix(".svg") if path.name != "result.json" else run_dir / "sweep.svg")
    logger.info("%s", paths[-1])
    if len(paths) == 1:
        reason = "the run requests another evaluation" if is_end else "these weights are not the end of the run"
        logger.info("%s is not written: %s", run_dir / "result.json", reason)


def is_configured_end(run_dir: Path, config: Config) -> bool:
    """True if `config` describes the final evaluation of the run in `run_dir`, or if the folder has no run.

    A run whose config.yaml says `evaluation.features=auto` accepts any network: at its start no weights were found.
    """
    path = run_dir / "config.yaml"
    if not path.exists():
        return True
    asked = load_config(path, stored=True)
    if asked.evaluation.features == AUTO:
        asked.evaluation.features = config.evaluation.features
        asked.evaluation.more_features = config.evaluation.more_features
    return _identity(config) == _identity(asked)


def _identity(config: Config) -> tuple[Any, ...]:
    """The settings that determine the final evaluation."""
    evaluation = {key: value for key, value in vars(config.evaluation).items() if key not in _ELSEWHERE}
    evaluation["sweep"] = sorted(config.evaluation.sweep or [])
    evaluation["reference"] = _place(config.evaluation.reference or config.data.shards)
    if config.evaluation.labels == "data":
        evaluation["labels"] = _place(config.data.shards)
    return config.model, config.diffusion, evaluation, config.engine.precision, config.engine.float8


def _place(pattern: str) -> str:
    """The same text for all spellings of a path or an address."""
    return masked(pattern) if is_remote(pattern) else os.path.realpath(pattern)


def _name(result: dict[str, Any]) -> str:
    """The file's name: the network, the number of images, and a hash of everything that determines the metrics."""
    points = [{key: row[key] for key in (*result["best"], "num_images")} for row in result["table"]]
    identity = {"protocol": result["protocol"], "reference": result["reference"], "settings": points}
    kind = "sweep_" if len(points) > 1 else ""
    return f"{kind}{result['protocol']['features']}_{result['num_images']}_{digest_of(identity)}"
