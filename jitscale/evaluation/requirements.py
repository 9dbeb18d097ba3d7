"""Checks before the first step that a run can be measured later: nobody finds out after 600 epochs."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from jitscale import parallel
from jitscale.config import Config, weight_set_names
from jitscale.errors import ConfigError, DataError
from jitscale.evaluation.cost import measuring_cost, percent
from jitscale.evaluation.evaluator import configured_labels
from jitscale.evaluation.networks import FEATURE_NETWORKS, NetworkFile, network_files, sizes_of
from jitscale.evaluation.real_images import RealImages, cache_folders
from jitscale.evaluation.reference import open_real_images, read_statistics, reference_source
from jitscale.evaluation.settings import final_settings, sweep_images
from jitscale.parallel import World
from jitscale.progressive import stages_of

logger = logging.getLogger(__name__)


def will_measure(config: Config) -> bool:
    """Whether a training with this configuration generates images and compares them."""
    return config.evaluation.at_end or config.evaluation.every_images > 0


def check_training_measures(config: Config, world: World) -> Config:
    """`check_measurable` for every stage of a training that will measure, and that this takes no more than is allowed.

    A collective call.

    Returns:
        The configuration to train with. A run without a final evaluation must not need a feature network's file:
        without one it is not measured on the way either, and that is said.

    Raises:
        UserError: on every rank.
    """
    if not config.evaluation.at_end and will_measure(config):
        try:
            network_files(config.evaluation, world)
        except DataError as error:
            if world.is_main:
                logger.warning("evaluation.at_end=false: nothing is measured on the way either: %s", error)
            config = replace(config, evaluation=replace(config.evaluation, every_images=0))
    weight_sets = weight_set_names(config)
    measured = [stage for stage in stages_of(config) if will_measure(stage)]
    if not measured:
        return config
    cost = parallel.raise_together(lambda: measuring_cost(config, weight_sets))
    limit = config.evaluation.sweep_max_share
    if limit is not None and cost.sweep_share > limit:
        raise ConfigError(
            f"evaluation.sweep_max_share={limit:g}: the sweep would take {percent(cost.sweep_share)} of the run's "
            f"compute (measuring: {cost}); lower evaluation.sweep_images, set evaluation.sweep=null, or raise it"
        )
    for stage in measured:
        check_measurable(stage, world, weight_sets, at_end=stage.evaluation.at_end)
    if world.is_main:
        logger.info("measuring: %s", cost)
    return config


def check_measurable(config: Config, world: World, weight_sets: Sequence[str], *, at_end: bool = True) -> None:
    """Feature networks, real images, labels, settings of the sweep and room are there; a collective call.

    Args:
        config: with `evaluation.features`.
        world: this rank.
        weight_sets: those that can be measured.
        at_end: whether there will be a final evaluation, or measurements on few images alone.

    Raises:
        ConfigError: on every rank: no feature network or reference is configured, the sweep is impossible, or there is
            no room.
        DataError: on every rank: weights are missing and cannot be downloaded now, or are no such network; the
            reference does not open or fit.
    """
    evaluation = config.evaluation
    files = network_files(evaluation, world)
    if evaluation.features_file is not None:  # published files are known by their hash
        parallel.on_main(lambda: _load_once(files[0]))
    source = reference_source(config)
    if source.endswith(".npz"):
        parallel.on_main(lambda: _check_statistics(Path(source), files))
    else:
        shards = parallel.raise_together(lambda: open_real_images(config))
        folders = cache_folders(config, shards, Path(config.run.dir), world)
        kept = [RealImages(file, shards, folders) for file in files]
        parallel.on_main(lambda: _check_cache_room(kept))
    parallel.raise_together(lambda: _check_settings(config))
    images = parallel.raise_together(lambda: images_of(config, weight_sets) if at_end else evaluation.few_images)
    parallel.on_main(lambda: _check_room(config, files, images))
    if world.is_main:
        swept = at_end and len(final_settings(config, weight_sets)) > 1
        _say_few_images(config, sizes_of(files), at_end=at_end, swept=swept)


def images_of(config: Config, weight_sets: Sequence[str]) -> int:
    """Images whose features a final evaluation keeps.

    Raises:
        ConfigError: the sweep is impossible.
    """
    evaluation, settings = config.evaluation, final_settings(config, weight_sets)
    if len(settings) == 1:
        return evaluation.num_images
    kept = min(evaluation.sweep_keep, len(settings))
    few = sweep_images(evaluation)
    return len(settings) * few + kept * (evaluation.num_images - few)


def _load_once(file: NetworkFile) -> None:
    file.load("cpu")


def _check_statistics(path: Path, files: list[NetworkFile]) -> None:
    read_statistics(path, files)


def _check_settings(config: Config) -> None:
    """What an evaluation would refuse only when it samples."""
    configured_labels(config)
    if config.evaluation.cuda_graphs and parallel.choose_device(config.run.device).type != "cuda":
        raise ConfigError("evaluation.cuda_graphs=true: there is no GPU here; set it to false")


def _check_room(config: Config, files: Sequence[NetworkFile], images: int) -> None:
    """Refuse to begin where the blocks of features will not fit.

    Raises:
        ConfigError: naming what is needed.
    """
    folder = Path(config.run.dir) / "evaluation"
    values = sum(size for file in files for size in file.sizes.values()) + FEATURE_NETWORKS[files[0].name].num_logits
    there = sum(path.stat().st_size for path in folder.glob("samples_*/block_*.npz"))
    needed, free = 4 * values * images - there, _free(folder)
    if needed > free:
        raise ConfigError(
            f"run.dir={config.run.dir}: {free / 1e9:.3g} GB are free, the features of {images} images take "
            f"{needed / 1e9:.3g} GB; make room, or lower evaluation.num_images or evaluation.sweep_images"
        )


def _check_cache_room(kept: Sequence[RealImages]) -> None:
    """Refuse to begin where the statistics of real images will not fit.

    Raises:
        ConfigError: naming what is needed.
    """
    needed, folder = sum(images.bytes_to_write() for images in kept), kept[0].folder
    free = _free(folder)
    if needed > free:
        raise ConfigError(
            f"{folder}: {free / 1e9:.3g} GB are free, computing the statistics of the real images takes "
            f"{needed / 1e9:.3g} GB; make room, or set evaluation.cache_dir"
        )


def _free(folder: Path) -> int:
    """Bytes, where `folder` is or will be."""
    absolute = folder.absolute()
    return shutil.disk_usage(next(path for path in (absolute, *absolute.parents) if path.exists())).free


def _say_few_images(config: Config, sizes: dict[str, int], *, at_end: bool, swept: bool) -> None:
    """Warn where covariances will be singular: the distance then depends mostly on the number of images."""
    evaluation = config.evaluation
    counts = {"num_images": evaluation.num_images} if at_end else {}
    if swept:
        counts["sweep_images"] = sweep_images(evaluation)
    if evaluation.every_images:
        counts["few_images"] = evaluation.few_images
    for name, count in counts.items():
        wide = {part: size for part, size in sizes.items() if size > count}
        if wide:
            logger.warning(
                "evaluation.%s=%d is fewer than the %d dimensions of %s: compare its distances with those of as many "
                "images only",
                name,
                count,
                max(wide.values()),
                ", ".join(wide),
            )
