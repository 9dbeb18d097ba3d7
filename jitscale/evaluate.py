"""Measure samples of a checkpoint: `python -m jitscale.evaluate --run DIR` or `--checkpoint FILE --config FILE`.

All ranks share the work, under torchrun, under srun, or in one process; started again, it goes on where it was. It
ends with result.json in the run's folder, or in `run.dir` for a bare checkpoint file. torchrun takes `--run` for an
option of its own: with it, write `--run-dir`.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

from jitscale import parallel
from jitscale.completion import mark_complete
from jitscale.config import load_config
from jitscale.errors import CheckpointError, ExitCode, exit_with_message
from jitscale.launcher_environment import adopt_launcher_environment


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and evaluate; returns the process's exit code."""
    parser = argparse.ArgumentParser(prog="python -m jitscale.evaluate", description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", "--run-dir", type=Path, metavar="DIR", help="a run's folder: its newest checkpoint")
    source.add_argument("--checkpoint", type=Path, metavar="FILE", help="a step folder, .safetensors or authors' .pth")
    parser.add_argument("--config", type=Path, metavar="FILE", help="a YAML file; default: the run's own config.yaml")
    parser.add_argument(
        "--weights",
        metavar="NAME",
        help="model, ema_<decay> or power_<width>; default: evaluation.weights (--checkpoint: if the command has it)",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="group.key=value", help="settings that win, such as evaluation.num_images=5000"
    )
    options = parser.parse_intermixed_args(arguments)
    if options.checkpoint is not None and options.config is None:
        parser.error("--checkpoint needs --config")

    adopt_launcher_environment()
    overrides = list(options.overrides)
    if options.run is not None:
        overrides.append(f"run.dir={options.run}")
        if not (options.run / "config.yaml").exists():
            raise CheckpointError(f"{options.run}: no run there (no config.yaml); give a run's folder, or --checkpoint")
    path = options.config or options.run / "config.yaml"
    # The batch of training does not matter here, so the run may be evaluated on any number of ranks.
    config = load_config(path, overrides, bf16_supported=parallel.bf16_supported)

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from jitscale.evaluation.distributed import evaluate_model  # noqa: PLC0415
    from jitscale.evaluation.generate import ready_to_sample  # noqa: PLC0415
    from jitscale.weights.opening import read_guide, read_weights  # noqa: PLC0415

    asked = options.run is not None or any(text.startswith("evaluation.weights=") for text in overrides)
    weights = read_weights(
        options.run or options.checkpoint,
        options.weights or (config.evaluation.weights if asked else None),
        config if options.checkpoint is not None else None,
    )
    model, guide = weights.build(), read_guide(config)
    world = parallel.start(parallel.choose_device(config.run.device))
    try:
        model = ready_to_sample(model, config, world.device)
        result = evaluate_model(model, weights.name, config, world, Path(config.run.dir), guide)
        if world.is_main:
            mark_complete(Path(config.run.dir), "evaluate")
        parallel.barrier()  # rank 0 serves the others' rendezvous: it must not leave first
    finally:
        parallel.stop()
    if world.is_main:
        print(json.dumps({key: value for key, value in result.items() if key != "protocol"}, indent=2))
    return ExitCode.DONE


if __name__ == "__main__":
    exit_with_message(main)
