"""Measure samples of a checkpoint: `python -m jitscale.evaluate --run DIR` or `--checkpoint FILE --config FILE`.

The command does the final evaluation of the configuration, including `evaluation.sweep` if it is set. If the command
line names a weight set or guidance, only that is measured.

All ranks share the work, under torchrun, under srun, or in one process. The same command continues an interrupted
evaluation. RUN/results keeps every result. RUN/result.json is the evaluation under the run's own config.yaml; for a
checkpoint file without a run, it is the last evaluation. torchrun has its own option `--run`, so write `--run-dir` with
torchrun.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jitscale import parallel
from jitscale.checkpoints.format import latest_checkpoint
from jitscale.checkpoints.opening import open_weights, read_guide
from jitscale.checkpoints.weights import StoredWeights
from jitscale.command import complete_source, evaluate_parser
from jitscale.config import Config, load_config
from jitscale.errors import ConfigError, ExitCode, exit_with_message
from jitscale.evaluation.choice import settle_features
from jitscale.evaluation.evaluator import Evaluator
from jitscale.evaluation.final import is_configured_end, run_evaluation
from jitscale.evaluation.generate import ready_on_all_ranks
from jitscale.evaluation.report import table_of
from jitscale.evaluation.requirements import check_measurable
from jitscale.evaluation.sweep import TRIED, images_of, sweep_points
from jitscale.launcher_environment import adopt_launcher_environment, make_kernel_caches
from jitscale.model.jit import JiT
from jitscale.run_folder import mark_complete
from jitscale.tracking import Tracker, check_wandb
from jitscale.training.state import RunState

logger = logging.getLogger(__name__)

# Settings that a sweep changes. If the command line sets one, there is no sweep.
SWEPT = tuple(f"evaluation.{name}=" for name in TRIED)


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and evaluate; returns the process's exit code."""
    options = evaluate_parser(__doc__).parse_intermixed_args(arguments)
    adopt_launcher_environment()
    make_kernel_caches()
    complete_source(options)
    # A checkpoint without a run is measured under one setting, unless the command line sets a sweep.
    alone = options.weights is not None or options.run is None
    overrides = [*options.overrides, *without_sweep(options.overrides, alone=alone)]
    described = options.run is not None
    evaluate(options.run or options.checkpoint, options.config, overrides, options.weights, described=described)
    return ExitCode.DONE


def without_sweep(overrides: Sequence[str], *, alone: bool = False) -> list[str]:
    """The override that disables the configured sweep, if `overrides` set what the sweep would choose.

    `alone`: disable the sweep for another reason. If `overrides` set a sweep, it stays in any case.
    """
    named = alone or any(text.startswith(SWEPT) for text in overrides)
    asked = any(text.startswith("evaluation.sweep=") for text in overrides)
    return ["evaluation.sweep=null"] if named and not asked else []


def evaluate(checkpoint: Path, path: Path, overrides: list[str], weights: str | None, *, described: bool) -> None:
    """Do the final evaluation of any stored weights and print it; joins and leaves the process group.

    The configuration is that of the YAML file `path` with the `overrides`. Results go to its `run.dir`. If `checkpoint`
    is a run, its own files describe the network (`described`); otherwise the configuration does. `weights` is the set
    to measure, unless a sweep names others. None: `evaluation.weights` if `checkpoint` is a run or the overrides set
    it, else the default of the stored weights. Raises a UserError, as `load_config`, `run_evaluation`, `open_weights`
    and `check_measurable` do.
    """
    if described:
        overrides = [*overrides, f"run.dir={checkpoint}"]
    # No world size is passed: training's batch does not matter here, so any number of ranks may evaluate.
    own = path == checkpoint / "config.yaml"
    config = load_config(path, overrides, bf16_supported=parallel.bf16_supported, stored=own)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if weights is None and (described or any(text.startswith("evaluation.weights=") for text in overrides)):
        weights = config.evaluation.weights
    stored = open_weights(checkpoint, None if described else config)
    config.evaluation.weights = stored.choose(weights)
    points = sweep_points(config, stored.weight_sets)
    run_dir = Path(config.run.dir)
    is_end = _is_end(stored, run_dir)
    with parallel.joined(parallel.choose_device(config.run.device)) as world:
        parallel.raise_together(lambda: stored.verify(world.rank, world.size))
        config, missing = settle_features(config)
        if missing:
            raise ConfigError(missing)
        guide = parallel.raise_together(lambda: read_guide(config, stored.class_names, world, world.device))
        check_measurable(config, world, points, stored.class_names)
        is_own = is_configured_end(run_dir, config)
        if world.is_main:
            for caution in filter(None, map(stored.caution, dict.fromkeys(point.weights for point in points))):
                logger.warning("%s", caution)
            logger.info("%d settings, %d images in all", len(points), images_of(points))

        def network(name: str) -> JiT:
            return ready_on_all_ranks(stored.network(name, world.device), config, world)

        result = run_evaluation(network, points, Evaluator(config, world, run_dir, guide), run_dir, is_end=is_end)

        def finish() -> None:
            mark_complete(run_dir, "evaluate")
            if described and is_end and is_own and config.tracking.wandb != "off":
                _track(config, run_dir, result)
            print(table_of(result))

        parallel.on_main(finish)


def _is_end(stored: StoredWeights, run_dir: Path) -> bool:
    """True if the stored weights are those at the end of the run in `run_dir`, or if there is no run."""
    if not (run_dir / "config.yaml").exists():
        return True
    newest = latest_checkpoint(run_dir)
    if newest is None or stored.path.resolve() != newest.path.resolve():
        return False
    reached = RunState(newest.progress.step, newest.progress.images)
    return reached.images_at_end(load_config(run_dir / "config.yaml", stored=True)) <= reached.images


def _track(config: Config, run_dir: Path, result: dict[str, Any]) -> None:
    """Add the final evaluation to the run's W&B record. Without a key for W&B, it stays in the files only."""
    try:
        check_wandb(config)
    except ConfigError as error:
        logger.warning("the result is not sent to W&B: %s", error)
        return
    tracker = Tracker(config, run_dir, active=True, resumed_step=None)
    tracker.log_final(result)
    tracker.close()


if __name__ == "__main__":
    exit_with_message(main)
