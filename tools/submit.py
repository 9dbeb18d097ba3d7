"""Submit runs to Slurm, as single jobs, sweeps or chains, and watch them.

    python tools/submit.py --config configs/jit_h_256.yaml --nodes 4 data.shards=/data/imagenet_256
    python tools/submit.py --config configs/jit_b_256.yaml --set optim.lr=1e-4,2e-4 data.shards=/data/imagenet_256
    python tools/submit.py --config configs/jit_h_256.yaml --run-dir runs/h_256 --nodes 4 \\
        --chain train:256,upgrade:512,train:512,evaluate \\
        --set 256/data.shards=/data/imagenet_256 --set 512/data.shards=/data/imagenet_512
    python tools/submit.py status --watch

A sweep is an array of jobs, with one run folder for each variant. In a chain, each stage waits until the one before it
has succeeded; if a stage fails, the later ones are cancelled. --dry-run prints the batch scripts. --local does the work
on this machine.
"""

import argparse
import sys
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import installed

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from jitscale.addresses import has_secret
from jitscale.command import Parser, natural
from jitscale.config import load_config
from jitscale.errors import ExitCode, UserError, exit_with_message
from jitscale.launch.stages import Stage, parse_chain, parse_settings
from jitscale.launch.submission import (
    Resources,
    batch_script,
    check_folder,
    check_partition,
    parse_options,
    records,
    state_of,
    submit,
    submit_here,
)

HOME = Path(__file__).parents[1]
REFRESH_SECONDS = 5.0
PIPE_COLUMNS = 200  # the width of the table if the output is no terminal


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line; submit the jobs, or show the table."""
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["status"]:
        return status(words[1:])
    parser = Parser(__doc__)
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="configuration of the (first) run")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="folder of the (first) run; default: run.dir")
    parser.add_argument("--chain", metavar="STAGES", help="stages, such as train:256,upgrade:512,train:512,evaluate")
    values = "a setting; several values make a sweep; 512/KEY=VALUE is for the stages at 512 px of a chain"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUES", help=values)
    parser.add_number("--nodes", 1, "nodes")
    parser.add_number("--tasks-per-node", 8, "ranks on each node")
    parser.add_argument("--gpus-per-node", type=natural, metavar="N", help="default: as many as tasks; 0 for none")
    parser.add_number("--cpus-per-task", 12, "cores for each rank")
    parser.add_number("--minutes", 24 * 60, "time limit of one start; the job is requeued until the run is complete")
    parser.add_argument("--partition", metavar="NAME", help="one, or several: a,b; default: the cluster's")
    parser.add_number("--signal-seconds", 300, "seconds before the time limit at which the run saves")
    more = "another long option of sbatch, such as account=vision or exclusive"
    parser.add_argument("--sbatch", action="append", default=[], metavar="OPTION[=VALUE]", help=more)
    logs = "folder of logs and records (default: %(default)s)"
    parser.add_argument("--folder", type=Path, default=Path("submissions"), metavar="DIR", help=logs)
    parser.add_argument("--dry-run", action="store_true", help="print the batch scripts and stop")
    parser.add_argument("--local", action="store_true", help="work on this machine, with as many ranks as tasks")
    parser.add_overrides("settings of all stages")
    for option, value in pairwise(words):
        if option == "--sbatch" and value.startswith("--"):
            raise UserError(f"--sbatch {value}: begins as an option of this command; write --sbatch={value}")
    options = parser.parse_intermixed_args(words)

    resources = Resources(
        nodes=options.nodes,
        tasks_per_node=options.tasks_per_node,
        gpus_per_node=options.tasks_per_node if options.gpus_per_node is None else options.gpus_per_node,
        cpus_per_task=options.cpus_per_task,
        minutes=options.minutes,
        partition=options.partition,
        signal_seconds=options.signal_seconds,
        options=parse_options(options.sbatch),
    )
    if options.signal_seconds >= 60 * options.minutes:
        limit = f"must be less than the time limit, --minutes {options.minutes}"
        raise UserError(f"--signal-seconds {options.signal_seconds}: {limit}; the job would stop at once")
    chains = plan(options)
    for path in (options.folder, *(stage.run_dir for chain in chains for stage in chain)):
        check_folder(path)
    for chain in chains:
        for stage in chain:
            stage.check(options.nodes * options.tasks_per_node)
    folder = options.folder.resolve()
    if options.dry_run:
        for chain in chains:
            for number, stage in enumerate(chain):
                print(f"--- {stage.name}: {' '.join(stage.arguments)}")
                print(batch_script(stage, resources, folder, "ID_OF_THE_JOB_BEFORE" if number else None))
        return ExitCode.DONE
    if options.local:
        for chain in chains:
            submit_here(chain, folder)
    else:
        check_partition(options.partition)
        submit(chains, resources, folder)
    show(folder)
    return ExitCode.DONE


def plan(options: argparse.Namespace) -> list[list[Stage]]:
    """The chains of the command line, one for each variant. Raises a UserError at impossible settings or stages."""
    if not options.config.is_file():
        raise UserError(f"{options.config}: no such config file; see the folder configs/")
    variants, at = parse_settings(options.set)
    # The stages refuse impossible settings later, one by one.
    run_dir = options.run_dir or Path(load_config(options.config).run.dir)
    ranks = options.tasks_per_node if options.local else None
    chains = []
    for suffix, variant in variants.items():
        stage = Stage(
            kind="train",
            config=options.config.resolve(),
            run_dir=Path(f"{run_dir}{suffix}").absolute(),
            overrides=(*options.overrides, *variant),
            home=HOME.resolve(),
            ranks=ranks,
        )
        chains.append([stage] if options.chain is None else parse_chain(options.chain, stage, at))
    if at and options.chain is None:
        raise UserError(f"--set {next(iter(at))}/...: is for one resolution of a chain; add --chain")
    for resolution in at:
        if not any(stage.resolution == resolution for stage in chains[0]):
            raise UserError(f"--set {resolution}/...: no stage of --chain {options.chain} is at {resolution} px")
    for setting in (setting for chain in chains for stage in chain for setting in stage.overrides):
        if has_secret(setting):
            remedy = "write ${oc.env:NAME} instead, or keep it in ~/.netrc"
            raise UserError(f"{setting}: contains a secret, which files in {options.folder} would show; {remedy}")
    return chains


def status(words: list[str]) -> int:
    """Show the table of all submitted jobs, once or until interrupted."""
    parser = Parser("Show all submitted jobs with their last metrics.", prog="submit.py status")
    parser.add_argument("--folder", type=Path, default=Path("submissions"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--watch", action="store_true", help="refresh the table until Ctrl-C")
    options = parser.parse_args(words)
    if not (options.folder / "jobs").is_dir():
        raise UserError(f"{options.folder}: no job was submitted from here; give the folder of the jobs by --folder")
    if options.watch:
        with Live(table(options.folder), refresh_per_second=2) as live, suppress(KeyboardInterrupt):
            while True:
                time.sleep(REFRESH_SECONDS)
                live.update(table(options.folder))
    else:
        show(options.folder)
    return ExitCode.DONE


def show(folder: Path) -> None:
    """Print the table once."""
    Console(width=None if sys.stdout.isatty() else PIPE_COLUMNS).print(table(folder))


def table(folder: Path) -> Table:
    """The table, with one line for each job."""
    found = Table()
    for column in ("job", "stage", "state"):
        found.add_column(column, no_wrap=True)
    for column in ("starts", "step", "images", "loss", "images/s"):
        found.add_column(column, justify="right", no_wrap=True)
    found.add_column("reason")
    everything = records(folder)
    colours = {"COMPLETED": "green", "RUNNING": "cyan", "PENDING": "yellow"}
    forms = {"step": ".0f", "images": ",.0f", "loss": ".4f", "images_per_second": ".1f"}
    for record in everything:
        now = state_of(record, everything)
        state = Text(now["state"], colours.get(now["state"], "red"))
        numbers = ["" if now.get(name) is None else format(now[name], form) for name, form in forms.items()]
        # As Text, because rich would read brackets in a str as markup.
        job, stage, reason = (Text(text) for text in (record.job, record.stage, now["reason"]))
        found.add_row(job, stage, state, str(now["restarts"] + 1), *numbers, reason)
    return found


if __name__ == "__main__":
    exit_with_message(main, same_on_all_ranks=False)
