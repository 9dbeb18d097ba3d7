"""Find the best guidance and average of a run: a sweep on few images, then the best settings on many.

    torchrun --nproc-per-node 8 tools/evaluate_fid.py --checkpoint runs/h \\
        --sweep guidance=1.0:4.0:0.1 ema=all interval=0.1:1.0,0.2:0.8 --coarse 5000 --fine 50000 --keep 3

Without --sweep it does the run's `evaluation.sweep`, as the end of a training does. All ranks share the work; the same
command continues an interrupted sweep. It ends with a table. RUN/results has the numbers and a figure; RUN/result.json
is written if the sweep is that of the run's config.yaml.
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
    """Parse the command line, sweep and report."""
    parser = Parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="PATH", help="a run, or any stored weights")
    parser.add_argument("--config", type=Path, metavar="FILE", help="default: the run's config.yaml")
    known = f"axes: {', '.join(AXES)}; default: evaluation.sweep"
    parser.add_argument("--sweep", nargs="+", default=[], metavar="AXIS=VALUES", help=known)
    for flag, setting, what in (
        ("--coarse", "sweep_images", "images of each setting"),
        ("--fine", "num_images", "images of the best"),
        ("--keep", "sweep_keep", "how many settings are best"),
    ):
        parser.add_argument(flag, type=int, metavar="N", dest=setting, help=f"{what}; default: evaluation.{setting}")
    parser.add_overrides("settings that win, after --")
    options = parser.parse_intermixed_args(arguments)
    axes = [text for text in options.sweep if "." not in text.partition("=")[0]]

    adopt_launcher_environment()
    path = options.config or options.checkpoint / "config.yaml"
    if not path.exists():
        raise ConfigError(f"{path}: not there; give --config FILE")
    overrides = [*options.overrides, *(text for text in options.sweep if text not in axes)]
    overrides += [f"evaluation.sweep={json.dumps(axes)}"] if axes else without_sweep(overrides)
    counts = {name: getattr(options, name) for name in ("sweep_images", "num_images", "sweep_keep")}
    overrides += [f"evaluation.{name}={count}" for name, count in counts.items() if count is not None]
    evaluate(options.checkpoint, path, overrides, None, described=options.config is None)
    return ExitCode.DONE


if __name__ == "__main__":
    exit_with_message(main)
