"""Repeat an experiment of docs/experiments.md: train and measure its runs, write its numbers and its figure.

    python tools/experiments.py upgrade --seeds 3

The same command continues an interrupted experiment: finished runs are kept under runs/experiments/. The results are
docs/experiments/NAME.json (numbers) and NAME.png (figure). --figure-only draws the figure again from the numbers.
"""

import argparse
import json
import os
import platform
import re
import time
from datetime import date
from pathlib import Path

import installed

import torch

from jitscale.command import Parser, run_python
from jitscale.errors import ExitCode, UserError, exit_with_message
from jitscale.files import atomic_write
from studies import (
    bf16,
    bottleneck,
    failing,
    guidance,
    internal,
    manifold,
    pairs,
    rank,
    resolution,
    routing,
    samplers,
    together,
    upgrade,
    upsampling,
)
from studies.run import ROOT
from studies.tasks import Experiment, Summary, outcomes_of

MODULES: list[Experiment] = [
    manifold,
    pairs,
    bottleneck,
    resolution,
    upgrade,
    upsampling,
    failing,
    guidance,
    rank,
    internal,
    routing,
    samplers,
    together,
    bf16,
]
EXPERIMENTS = {module.__name__.removeprefix("studies."): module for module in MODULES}
LIST = re.compile(r"\[([^\[\]{}\"]*)\]")  # a list of numbers
ALONE = "upgrade"  # takes as long as all others together


def main() -> int:
    """Parse the command line, and measure or draw the experiments that it names."""
    listed = "\n".join(f"  {name:12}{(module.__doc__ or '').splitlines()[0]}" for name, module in EXPERIMENTS.items())
    parser = Parser(f"{__doc__}\n{listed}")
    names = f"an experiment of this list, or all: every one except {ALONE}, which takes two hours"
    parser.add_argument("name", choices=[*EXPERIMENTS, "all"], metavar="NAME", help=names)
    parser.add_number("--seeds", 3, "runs of each kind, with the seeds 0, 1, ...")
    parser.add_number("--budget", float("inf"), "begin no run after so many minutes", float)
    parser.add_workers()
    parser.add_argument(
        "--output", type=Path, default=ROOT / "docs/experiments", metavar="DIR", help="folder of the results"
    )
    parser.add_argument(
        "--figure-only", action="store_true", help="train nothing; draw the figure from the numbers in DIR"
    )
    options = parser.parse_args()
    options.output = options.output.resolve()
    os.chdir(ROOT)  # the configurations name their shards from here
    started = time.monotonic()
    for name in [name for name in EXPERIMENTS if name != ALONE] if options.name == "all" else [options.name]:
        experiment, results = EXPERIMENTS[name], options.output / f"{name}.json"
        if not options.figure_only:
            measure(name, options, results, max(0.0, options.budget - (time.monotonic() - started) / 60))
        elif not results.exists():
            raise UserError(f"{results}: not there; leave out --figure-only")
        summary = json.loads(results.read_text())
        experiment.draw(summary, results.with_suffix(".png"))
        print("\n".join(experiment.describe(summary)))
        print(f"{results}, {results.with_suffix('.png')}")
    return ExitCode.DONE


def measure(name: str, options: argparse.Namespace, results: Path, minutes: float) -> None:
    """Do the remaining tasks, begin none after `minutes`, and write the numbers.

    Raises a UserError if a task or a tool fails, or if the time is not enough.
    """
    experiment = EXPERIMENTS[name]
    for kind, size in experiment.SHARDS:
        run_python(f"tools/make_{kind}.py", f"--resolution={size}", f"--output=runs/{kind}/{size}px", cwd=ROOT)
    tasks = [task for seed in range(options.seeds) for task in experiment.tasks(seed)]
    outcomes = outcomes_of(tasks, Path("runs/experiments") / name, options.workers, minutes)
    facts = {
        "command": f"python tools/experiments.py {name} --seeds {options.seeds}",
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "torch": torch.__version__,
        "seconds_of_workers": round(sum(o["training_seconds"] + o["measuring_seconds"] for o in outcomes.values())),
    }
    results.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(results) as file:
        file.write(as_text({**facts, **experiment.summarise(outcomes)}).encode())


def as_text(summary: Summary) -> str:
    """JSON with a line for each key, and one for each list of numbers."""
    return LIST.sub(lambda found: f"[{' '.join(found[1].split())}]", json.dumps(summary, indent=1)) + "\n"


if __name__ == "__main__":
    exit_with_message(main, same_on_all_ranks=False)
