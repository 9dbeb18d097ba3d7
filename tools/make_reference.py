"""Compute the statistics of real images for the Fréchet distance once: mean and covariance of their features.

    torchrun --nproc-per-node 8 tools/make_reference.py --config configs/jit_h_256.yaml --output imagenet_256.npz \\
        evaluation.features=inception data.shards=/data/imagenet_256
    python -m jitscale.evaluate --run runs/jit_h_256 evaluation.reference=imagenet_256.npz

All ranks share the work. If the command is interrupted, the same command continues it. It reuses features that a run
has stored next to the shards, and stores new ones there. The file holds the number of images, the network with the hash
of its weights, and the image size. An evaluation with another network refuses the file.
"""

import json
import logging
from pathlib import Path

import installed

from jitscale import parallel
from jitscale.command import Parser, refuse_existing
from jitscale.config import load_config
from jitscale.errors import ConfigError, ExitCode, UserError, exit_with_message
from jitscale.evaluation.choice import settle_features
from jitscale.evaluation.networks import Embedder
from jitscale.evaluation.reference import reference_of
from jitscale.evaluation.statistics_file import StoredStatistics, is_statistics, write_statistics
from jitscale.launcher_environment import adopt_launcher_environment


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, compute the statistics, and write them."""
    parser = Parser(__doc__)
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="a YAML file, see configs/")
    parser.add_argument("--output", type=Path, required=True, metavar="NPZ", help="the .npz file to write")
    parser.add_overrides()
    options = parser.parse_intermixed_args(arguments)

    adopt_launcher_environment()
    config = load_config(options.config, options.overrides)
    source = config.evaluation.reference or config.data.shards
    if config.evaluation.features is None:
        raise ConfigError("evaluation.features is null; name the network, such as inception")
    if options.output.suffix != ".npz":
        raise UserError(f"--output {options.output}: must end in .npz")
    if is_statistics(source):
        raise UserError(f"evaluation.reference={source}: is already a statistics file; name shards")
    refuse_existing(options.output)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with parallel.joined(parallel.choose_device(config.run.device)) as world:
        config, missing = settle_features(config)
        if missing:
            raise ConfigError(missing)
        reference = reference_of(Embedder(config.evaluation, world), config, world, Path(config.run.dir))

        def write() -> None:
            assert reference is not None, "rank 0 has it"
            stored = StoredStatistics(reference.statistics, reference.floors, reference.facts)
            write_statistics(options.output, stored)
            print(f"{options.output}: {json.dumps(reference.facts)}")

        parallel.on_main(write)
    return ExitCode.DONE


if __name__ == "__main__":
    exit_with_message(main)
