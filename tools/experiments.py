"""Repeat an experiment of docs/: train and measure its runs, write its numbers and its figure.

    python tools/experiments.py upgrade --seeds 3

Started again, it goes on where it was: what has been measured is kept under runs/experiments/. The results are
docs/experiments/NAME.json and NAME.svg; --figure-only draws the latter from the former.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch

from jitscale.errors import ExitCode, UserError, exit_with_message
from jitscale.files import atomic_write
from studies import bottleneck, failing, guidance, manifold, pairs, resolution, upgrade, upsampling
from studies.run import ROOT
from studies.tasks import Experiment, outcomes_of

EXPERIMENTS: dict[str, Experiment] = {
    "manifold": manifold.EXPERIMENT,
    "pairs": pairs.EXPERIMENT,
    "bottleneck": bottleneck.EXPERIMENT,
    "resolution": resolution.EXPERIMENT,
    "upgrade": upgrade.EXPERIMENT,
    "upsampling": upsampling.EXPERIMENT,
    "failing": failing.EXPERIMENT,
    "guidance": guidance.EXPERIMENT,
}
ALONE = "upgrade"  # takes as long as all others together


def main() -> int:
    """Parse the command line and run what it names."""
    listed = "\n".join(f"  {name:12}{experiment.title}" for name, experiment in EXPERIMENTS.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\n{listed}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "name",
        choices=[*EXPERIMENTS, "all"],
        metavar="NAME",
        help=f"one of those above, or all: every one but {ALONE}, which takes two hours",
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--budget", type=float, metavar="MINUTES", help="after which no further run is begun")
    cores = os.cpu_count() or 1
    parser.add_argument("--workers", type=int, default=cores, metavar="N", help="side by side; default: %(default)s")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/experiments", metavar="DIR", help="of the results")
    parser.add_argument("--figure-only", action="store_true", help="draw again from what DIR holds")
    options = parser.parse_args()
    if options.seeds < 1 or options.workers < 1:
        parser.error("--seeds and --workers must be at least 1")
    options.output = options.output.resolve()
    os.chdir(ROOT)  # the configurations name their shards from here
    started = time.monotonic()
    for name in [name for name in EXPERIMENTS if name != ALONE] if options.name == "all" else [options.name]:
        experiment, results = EXPERIMENTS[name], options.output / f"{name}.json"
        if not options.figure_only:
            spent = (time.monotonic() - started) / 60
            left = None if options.budget is None else max(0.0, options.budget - spent)
            measure(name, experiment, options, results, left)
        elif not results.exists():
            raise UserError(f"{results}: not there; leave out --figure-only")
        summary = json.loads(results.read_text())
        experiment.draw(summary, results.with_suffix(".svg"))
        print("\n".join(experiment.describe(summary)))
        print(f"{results}, {results.with_suffix('.svg')}")
    return ExitCode.DONE


def measure(
    name: str, experiment: Experiment, options: argparse.Namespace, results: Path, minutes: float | None
) -> None:
    """Do what is left, beginning nothing after `minutes`, and write the numbers."""
    for tool in experiment.tools:
        finished = subprocess.run([sys.executable, *tool], check=False)
        if finished.returncode != 0:
            raise UserError(f"{' '.join(tool)}: ended with code {finished.returncode}; see above")
    outcomes = outcomes_of(experiment.tasks(options.seeds), Path("runs/experiments") / name, options.workers, minutes)
    facts = {
        "command": f"python tools/experiments.py {name} --seeds {options.seeds}",
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "torch": torch.__version__,
        "seconds_of_workers": round(sum(o["training_seconds"] + o["measuring_seconds"] for o in outcomes.values())),
    }
    results.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(results) as file:
        file.write(json.dumps({**facts, **experiment.summarise(outcomes)}, indent=1).encode())


if __name__ == "__main__":
    exit_with_message(main, same_on_all_ranks=False)
