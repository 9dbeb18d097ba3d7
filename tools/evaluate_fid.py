"""Find the best guidance and average of a run: sweep on few images, then measure the best settings on many.

    torchrun --nproc-per-node 8 tools/evaluate_fid.py --checkpoint runs/jit_h_256 \\
        --sweep guidance=1.8:2.6:0.2 ema=averages --coarse 5000 --fine 50000 --keep 3

Without --sweep it uses the run's `evaluation.sweep`, as the end of a training does. All ranks share the work. If a
sweep is interrupted, the same command continues it. The command ends with a table. RUN/results holds the numbers and a
figure. RUN/result.json is written only if the sweep is that of the run's config.yaml.
"""

import json
from pathlib import Path

import installed

from jitscale.command import Parser
from jitscale.errors import ConfigError, ExitCode, exit_with_message
from jitscale.evaluate import evaluate, without_sweep
from jitscale.evaluation.sweep import AXES
from jitscale.launcher_environment import adopt_launcher_environment


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, sweep, and print the table."""
    parser = Parser(__doc__)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="PATH", help="a run's folder, or any stored weights"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="a YAML file; default: the run's config.yaml")
    known = f"axes: {', '.join(AXES)}; default: evaluation.sweep"
    parser.add_argument("--sweep", nargs="+", default=[], metavar="AXIS=VALUES", help=known)
    for flag, setting, what in (
        ("--coarse", "sweep_images", "images for each setting"),
        ("--fine", "num_images", "images for each of the best settings"),
        ("--keep", "sweep_keep", "number of best settings"),
    ):
        parser.add_argument(flag, type=int, metavar="N", dest=setting, help=f"{what}; default: evaluation.{setting}")
    parser.add_overrides("settings that win over the file, such as evaluation.seed=1")
    options = parser.parse_intermixed_args(arguments)
    axes = [text for text in options.sweep if "." not in text.partition("=")[0]]

    adopt_launcher_environment()
    path = options.config or options.checkpoint / "config.yaml"
    if not path.exists():
        raise ConfigError(f"{path}: does not exist; give --config FILE")
    overrides = [*options.overrides, *(text for text in options.sweep if text not in axes)]
    overrides += [f"evaluation.sweep={json.dumps(axes)}"] if axes else without_sweep(overrides)
    counts = {name: getattr(options, name) for name in ("sweep_images", "num_images", "sweep_keep")}
    overrides += [f"evaluation.{name}={count}" for name, count in counts.items() if count is not None]
    evaluate(options.checkpoint, path, overrides, None, described=options.config is None)
    return ExitCode.DONE


if __name__ == "__main__":
    exit_with_message(main)
