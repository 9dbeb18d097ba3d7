"""Chooses the network for `evaluation.features=auto`: the images' own small network, or a published one.

A published network is chosen only if its weights are on this machine: nothing is downloaded here. A run keeps the
network of its earlier measurements, because distances of different networks are not comparable.
"""

import json
import logging
from dataclasses import replace
from pathlib import Path

from jitscale import parallel
from jitscale.config import AUTO, Config, EvaluationConfig, load_config
from jitscale.data.shards import open_setting
from jitscale.evaluation.networks import PUBLISHED
from jitscale.evaluation.published import published_folder
from jitscale.evaluation.reference import reference_setting, reference_source
from jitscale.evaluation.small_networks import SMALL_NETWORKS
from jitscale.evaluation.statistics_file import is_statistics, network_of_statistics

logger = logging.getLogger(__name__)

PREFERRED = ("inception", "dinov2")  # for images without an own network: the first with weights on this machine


def settle_features(config: Config) -> tuple[Config, str]:
    """`config` with a network for `evaluation.features=auto`, and a message if no network is found; a collective call.

    If no weights are on this machine, `features` stays auto, and the message names the command that downloads them. If
    a configured small network belongs to other images than the real ones, a warning says so. Raises what
    `reference_source`, `open_setting` and `network_of_statistics` raise, on every rank.
    """

    def settle() -> tuple[Config, str]:
        if config.evaluation.features != AUTO:
            _warn_of_other_images(config)
            return config, ""
        fitting = fitting_networks(config)
        at_hand = [name for name in fitting if _is_at_hand(name, config.evaluation)]
        if not at_hand:
            return config, _missing(fitting, config.evaluation)
        before = _network_before(config)
        name = before if before in at_hand else at_hand[0]
        if before in fitting and before != name:
            remedy = _fetching(before, config.evaluation)
            what = f"{name}, because the weights of {before}, which measured this run before, are missing"
            logger.warning("evaluation.features=auto: %s; distances of the two are not comparable; %s", what, remedy)
        else:
            reason = "as before" if name == before else "the images' own" if name in SMALL_NETWORKS else "weights found"
            logger.info("evaluation.features=auto: %s (%s)", name, reason)
        further = [other for other in config.evaluation.more_features if other != name]
        return replace(config, evaluation=replace(config.evaluation, features=name, more_features=further)), ""

    return parallel.on_main(settle)


def settle_for_training(config: Config) -> tuple[Config, str]:
    """`settle_features` for a run that may measure itself; a collective call.

    If no network is found, the run is trained without measurements. The message is logged as a warning here, and the
    caller repeats it at the end of the run.
    """
    if not config.evaluation.at_end and not config.evaluation.every_images:
        return config, ""
    settled, missing = settle_features(config)
    if missing:
        missing = f"{missing}; then python -m jitscale.evaluate --run {config.run.dir}"
        settled = replace(settled, evaluation=replace(settled.evaluation, at_end=False, every_images=0))
        parallel.on_main(lambda: logger.warning("%s", missing))
    return settled, missing


def fitting_networks(config: Config) -> tuple[str, ...]:
    """The networks that fit the configured real images, the preferred one first. Raises as `settle_features`."""
    source = reference_source(config)
    if is_statistics(source):
        return (network_of_statistics(source),)
    dataset = _dataset(config)
    return (dataset,) if dataset in SMALL_NETWORKS else PREFERRED


def _dataset(config: Config) -> str | None:
    """The name of the data set of the real images, from the manifests of their shards."""
    return open_setting(config, *reference_setting(config)).dataset


def _is_at_hand(name: str, evaluation: EvaluationConfig) -> bool:
    return name not in PUBLISHED or (published_folder(evaluation) / PUBLISHED[name].file_name).exists()


def _network_before(config: Config) -> str | None:
    """The network that the run's configuration names, or else its result."""
    run_dir = Path(config.run.dir)
    path = run_dir / "config.yaml"
    named = load_config(path, stored=True).evaluation.features if path.exists() else None
    if named not in (None, AUTO):
        return named
    try:
        protocol = json.loads((run_dir / "result.json").read_bytes())["protocol"]
        return str(protocol["features"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None  # no result, or a damaged one, which the evaluation overwrites


def _missing(fitting: tuple[str, ...], evaluation: EvaluationConfig) -> str:
    """The message that no weights are on this machine, with the remedy."""
    what = f"no weights of {' or '.join(fitting)} in {published_folder(evaluation)}, so there is no FID"
    return f"evaluation.features=auto: {what}; {_fetching(fitting[0], evaluation)}"


def _fetching(name: str, evaluation: EvaluationConfig) -> str:
    return PUBLISHED[name].remedy(published_folder(evaluation).absolute())


def _warn_of_other_images(config: Config) -> None:
    """Warn about each configured small network that was trained on other images than the real ones."""
    evaluation = config.evaluation
    small = [name for name in (evaluation.features, *evaluation.more_features) if name in SMALL_NETWORKS]
    if not small or evaluation.features_file is not None or is_statistics(reference_source(config)):
        return
    dataset = _dataset(config)
    for name in small:
        if name != dataset:
            setting = "features" if name == evaluation.features else "more_features"
            what = f"is only for images of tools/make_{name}.py, but {reference_setting(config)[0]} has others"
            remedy = "its numbers mean nothing; set evaluation.features=auto"
            logger.warning("evaluation.%s: %s %s: %s", setting, name, what, remedy)
