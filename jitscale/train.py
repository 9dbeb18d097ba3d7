"""Train a model: `python -m jitscale.train --config configs/jit_h_256.yaml [group.key=value ...]`.

The same command resumes the run from its newest checkpoint. Start it as one process, with torchrun, or with srun.
"""

import argparse
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from jitscale import parallel
from jitscale.checkpoints.format import complete_checkpoints
from jitscale.checkpoints.opening import open_weights
from jitscale.checkpoints.upgrade import plan_upgrade, write_upgraded
from jitscale.command import train_parser
from jitscale.config import Config, explained_yaml, load_config
from jitscale.config.listing import settings_page
from jitscale.errors import ExitCode, exit_with_message
from jitscale.evaluation.choice import settle_for_training
from jitscale.evaluation.requirements import measurable_config
from jitscale.launcher_environment import adopt_launcher_environment, make_kernel_caches
from jitscale.parallel import World
from jitscale.progressive import stages_of
from jitscale.run_folder import after_the_end, claim, mark_complete
from jitscale.tracking import check_wandb
from jitscale.training.feed import open_once_a_node
from jitscale.training.trainer import train

logger = logging.getLogger(__name__)


class _ListSettings(argparse.Action):
    """Acts while the command line is parsed, as --help does, so that --config is not needed."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(settings_page(), end="")
        parser.exit()


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and train; returns the process's exit code."""
    parser = train_parser(__doc__)
    parser.add_argument(
        "--list-settings", action=_ListSettings, nargs=0, help="print all settings that exist, and exit"
    )
    options = parser.parse_intermixed_args(arguments)
    overrides = [*options.overrides, *(["run.profile=true"] if options.profile else [])]
    world_size = adopt_launcher_environment()
    make_kernel_caches()
    config = load_config(
        options.config,
        overrides,
        world_size=world_size,
        bf16_supported=parallel.bf16_supported,
        needs_shards=not options.print_config,
    )
    if options.print_config:
        print(explained_yaml(config), end="")
        return ExitCode.DONE
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with parallel.joined(parallel.choose_device(config.run.device), config.run.hang_timeout) as world:
        parallel.on_main(lambda: check_wandb(config))  # only rank 0 records, and perhaps only its node has the key
        settled, missing = settle_for_training(config)
        measured = measurable_config(settled, world)
        with ExitStack() as held:
            code = _train_through(stages_of(measured), world, held)
            if code == ExitCode.DONE:
                complete = partial(mark_complete, Path(config.run.dir), "train", config)
                code = after_the_end(lambda: parallel.on_main(complete))
                if missing and world.is_main:
                    logger.warning("%s", missing)
        return code


def _train_through(stages: Sequence[Config], world: World, held: ExitStack) -> int:
    """Train every stage to its end, beginning with the last stage that has a checkpoint, or else with the first.

    The last stage's folder is the run's own. It is locked from the first stage on, until `held` is closed.
    """
    for stage in stages[1:]:  # finds missing shards before time is spent on the first stage
        open_once_a_node(stage, world)
    claimed = claim(Path(stages[-1].run.dir), held)
    first = parallel.on_main(lambda: _last_begun(stages))  # one rank looks: file systems lag
    for number, stage in enumerate(stages[first:], first):
        if number > first:
            parallel.on_main(partial(_upgrade, stages[number - 1], stage))
        code = train(stage, world, claimed if stage is stages[-1] else None)
        if code != ExitCode.DONE:
            return code
    return ExitCode.DONE


def _last_begun(stages: Sequence[Config]) -> int:
    """The number of the last stage that has a checkpoint; 0 if none has one."""
    begun = [number for number, stage in enumerate(stages) if complete_checkpoints(Path(stage.run.dir))]
    return max(begun, default=0)


def _upgrade(low: Config, high: Config) -> None:
    """Write the first checkpoint of the stage `high` from the newest checkpoint of the stage `low`."""
    logger.info("from %d to %d px", low.model.image_size, high.model.image_size)
    stored = open_weights(low.run.dir)
    stored.verify()
    write_upgraded(stored, high, plan_upgrade(stored.config, high))


if __name__ == "__main__":
    exit_with_message(main)
