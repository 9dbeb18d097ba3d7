"""Statistics of real images for the Fréchet distance, computed once: mean and covariance of their features.

    torchrun --nproc-per-node 8 tools/make_reference.py --config configs/jit_h_256.yaml --output imagenet_256.npz \\
        evaluation.features=inception data.shards=/data/imagenet_256
    python -m jitscale.evaluate --run runs/h evaluation.reference=imagenet_256.npz

All ranks share the work, and started again it goes on where it was; what a run has kept beside the shards is used, and
what is computed here is kept there. The file says from how many images, by which
network (with the hash of its weights) and of which size it was made; an evaluation with another network refuses it.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

from jitscale import parallel
from jitscale.config import load_config
from jitscale.errors import ConfigError, ExitCode, UserError, exit_with_message
from jitscale.evaluation.networks import Embedder
from jitscale.evaluation.reference import reference_of, write_statistics
from jitscale.launcher_environment import adopt_launcher_environment


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, compute and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="a YAML file, see configs/")
    parser.add_argument("--output", type=Path, required=True, metavar="NPZ", help="the file to write")
    parser.add_argument("overrides", nargs="*", metavar="group.key=value", help="settings that win over the file")
    options = parser.parse_intermixed_args(arguments)

    adopt_launcher_environment()
    config = load_config(options.config, options.overrides)
    evaluation = config.evaluation
    source = evaluation.reference or config.data.shards
    if evaluation.features is None:
        raise ConfigError("evaluation.features is null; name the network, such as inception")
    if options.output.suffix != ".npz" or source.endswith(".npz"):
        raise UserError(f"--output {options.output}: must end in .npz, and be made from shards (data.shards={source})")
    if options.output.exists():
        raise UserError(f"{options.output}: exists already; remove it or choose another --output")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    world = parallel.start(parallel.choose_device(config.run.device))
    try:
        reference = reference_of(Embedder(evaluation, world), config, world, Path(config.run.dir))
        if reference is not None:
            write_statistics(options.output, reference)
            print(f"{options.output}: {json.dumps(reference.facts)}")
        parallel.barrier()  # rank 0 serves the others' rendezvous: it must not leave first
    finally:
        parallel.stop()
    return ExitCode.DONE


if __name__ == "__main__":
    exit_with_message(main)
