"""Checks, before the first step, that a run can be measured later, so that it does not fail after 600 epochs."""

import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from jitscale import parallel
from jitscale.config import Config, EvaluationConfig, weight_set_names
from jitscale.errors import ConfigError, DataError
from jitscale.evaluation.blocks import SAMPLE_BLOCKS
from jitscale.evaluation.class_names import check_order
from jitscale.evaluation.cost import measuring_cost, percent
from jitscale.evaluation.evaluator import configured_labels
from jitscale.evaluation.networks import FEATURE_NETWORKS, network_files, sizes_of
from jitscale.evaluation.reference import open_real_images, reference_source
from jitscale.evaluation.statistics_file import read_statistics
from jitscale.evaluation.sweep import SweepPoint, images_of, sweep_images, sweep_points
from jitscale.parallel import World
from jitscale.progressive import stages_of

logger = logging.getLogger(__name__)


def measurable_config(config: Config, world: World) -> Config:
    """`config`, after `check_measurable` of all stages that are measured; a collective call.

    A run without a final evaluation must not need a feature network's file. If the file is missing, measurements during
    training are turned off in the result, and a warning says so. Raises a UserError on every rank if a check fails, or
    if the sweep takes more compute than `evaluation.sweep_max_share`.
    """
    if not config.evaluation.at_end and config.evaluation.every_images:
        try:
            network_files(config.evaluation, world)
        except DataError as error:
            if world.is_main:
                logger.warning("evaluation.at_end=false: nothing is measured during training either: %s", error)
            config = replace(config, evaluation=replace(config.evaluation, every_images=0))
    measured = [stage for stage in stages_of(config) if stage.evaluation.at_end or stage.evaluation.every_images]
    if not measured:
        return config
    cost = measuring_cost(config)
    limit, sweep_share = config.evaluation.sweep_max_share, cost.share_of(cost.sweep)
    if limit is not None and sweep_share > limit:
        fault = f"the sweep would take {percent(sweep_share)} of the run's compute (measuring: {cost})"
        remedy = "lower evaluation.sweep_images, set evaluation.sweep=null, or raise it"
        raise ConfigError(f"evaluation.sweep_max_share={limit:g}: {fault}; {remedy}")
    for stage in measured:
        points = sweep_points(stage, weight_set_names(stage)) if stage.evaluation.at_end else []
        check_measurable(stage, world, points)
    if world.is_main:
        logger.info("measuring: %s", cost)
    return config


def check_measurable(
    config: Config, world: World, points: Sequence[SweepPoint], class_names: Sequence[str] | None = None
) -> None:
    """Check that feature networks, real images, labels and room on the disk are available; a collective call.

    The final evaluation tries `points`; if there are none, the run only measures itself on few images. `class_names`
    are those stored with the weights; None if the weights are not trained yet, or the names are unknown.

    Raises on every rank a ConfigError if no feature network or reference is configured, or there is not enough room.
    Raises a DataError if weights of a feature network are missing and cannot be downloaded now, or belong to another
    network, or if the reference cannot be opened or does not fit.
    """
    evaluation, run_dir = config.evaluation, Path(config.run.dir)
    files, source = network_files(evaluation, world), reference_source(config)
    kept = open_real_images(files, config, world, run_dir)

    def check() -> None:
        if evaluation.features_file is not None:  # loaded as a check; other files are checked by their hash
            files[0].load("cpu")
        if kept:
            needed, folder = sum(images.bytes_to_write() for images in kept), kept[0].folder
            purpose = "computing the statistics of the real images takes"
            _check_room(folder, needed, f"{folder}", purpose, "set evaluation.cache_dir")
        else:
            read_statistics(source, files, config.model.in_channels)
        check_order(config, class_names, kept[0].class_names if kept else None)
        configured_labels(config)
        if evaluation.cuda_graphs and parallel.choose_device(config.run.device).type != "cuda":
            raise ConfigError("evaluation.cuda_graphs=true: there is no GPU here; set it to false")
        if points:
            images, folder = images_of(points), run_dir / "evaluation"
            values = sum(sizes_of(files).values()) + FEATURE_NETWORKS[files[0].name].num_logits
            needed = 4 * values * images - sum(path.stat().st_size for path in folder.glob(SAMPLE_BLOCKS))
            purpose = f"the features of {images} images take"
            remedy = "lower evaluation.num_images or evaluation.sweep_images"
            _check_room(folder, needed, f"run.dir={config.run.dir}", purpose, remedy)
        _warn_of_few_images(evaluation, sizes_of(files), len(points))

    parallel.on_main(check)


def _check_room(folder: Path, needed: int, named: str, purpose: str, remedy: str) -> None:
    """Raise a ConfigError if `needed` bytes do not fit into `folder`, which need not exist yet."""
    absolute = folder.absolute()
    free = shutil.disk_usage(next(path for path in (absolute, *absolute.parents) if path.exists())).free
    if needed > free:
        room = f"{free / 1e9:.3g} GB are free, {purpose} {needed / 1e9:.3g} GB"
        raise ConfigError(f"{named}: {room}; make room, or {remedy}")


def _warn_of_few_images(evaluation: EvaluationConfig, sizes: dict[str, int], points: int) -> None:
    """Warn if a covariance will be singular: then the distance depends mostly on the number of images."""
    counts = {"num_images": evaluation.num_images} if points else {}
    if points > 1:
        counts["sweep_images"] = sweep_images(evaluation)
    if evaluation.every_images:
        counts["few_images"] = evaluation.few_images
    for name, count in counts.items():
        wide = {array: size for array, size in sizes.items() if size > count}
        if wide:
            few = f"evaluation.{name}={count} is fewer than the {max(wide.values())} dimensions of {', '.join(wide)}"
            logger.warning("%s: compare its distances only with distances on the same number of images", few)
