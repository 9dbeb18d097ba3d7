"""Parts that all commands share: the parser, the types of options, and a table for terminals and pages."""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jitscale.errors import CheckpointError, ExitCode, UserError, escaped
from jitscale.files import with_home

BYTES = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


class Parser(argparse.ArgumentParser):
    """A parser whose help begins with a module's docstring, and whose errors are one line and exit code 2."""

    def __init__(self, description: str | None = None, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(description=description, **options)
        self.register("type", Path, lambda text: Path(path_text(text)))  # for all options of `type=Path`

    def error(self, message: str) -> NoReturn:
        """Print the error as `exit_with_message` does, on each rank: no rank is the main one before the ranks meet."""
        self.exit(ExitCode.USER_ERROR, f"error: {escaped(message)}; see --help\n")

    def add_overrides(self, meaning: str = "settings that replace those of the file") -> None:
        """Add the positional arguments `overrides`; `parse_intermixed_args` accepts them between options too."""
        self.add_argument("overrides", nargs="*", metavar="group.key=value", help=meaning)

    def add_number(
        self, name: str, default: object, meaning: str, kind: Callable[[str], object] | None = None, **more: Any
    ) -> None:
        """Add an option with a default: a positive integer, unless `kind` is another type."""
        described = f"{meaning} (default: %(default)s)"
        self.add_argument(name, type=kind or positive, default=default, metavar="N", help=described, **more)

    def add_workers(self) -> None:
        """Add `--workers`, the number of processes."""
        meaning = "processes (default: the cores that this process may use, %(default)s)"
        self.add_argument("--workers", type=positive, default=usable_cores(), metavar="N", help=meaning)

    def add_json(self) -> None:
        """Add `--json`, for programs that read the output."""
        self.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


# The command lines of a run. The supervisor of a batch script parses them too, before the ranks do.


def train_parser(description: str | None = None) -> Parser:
    """The parser of `python -m jitscale.train`."""
    parser = Parser(description, prog="python -m jitscale.train")
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="a YAML file, see configs/")
    parser.add_argument("--print-config", action="store_true", help="print all settings with their meanings, and exit")
    parser.add_argument("--profile", action="store_true", help="the same as run.profile=true")
    parser.add_overrides("settings that replace those of the file, such as optim.lr=1e-4")
    return parser


def evaluate_parser(description: str | None = None) -> Parser:
    """The parser of `python -m jitscale.evaluate`; `complete_source` checks its options."""
    parser = Parser(description, prog="python -m jitscale.evaluate")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--run", "--run-dir", type=Path, metavar="DIR", help="a run's folder (its newest checkpoint)")
    source.add_argument("--checkpoint", type=Path, metavar="FILE", help="a step folder, .safetensors or authors' .pth")
    parser.add_argument("--config", type=Path, metavar="FILE", help="a YAML file; default: the run's own config.yaml")
    sets = "model, ema_<decay> or power_<width>; default: evaluation.weights (with --checkpoint: if it is given here)"
    parser.add_argument("--weights", metavar="NAME", help=sets)
    parser.add_overrides("settings that replace those of the file, such as evaluation.num_images=5000")
    return parser


def complete_source(options: argparse.Namespace) -> None:
    """Fill in the configuration of the run to evaluate.

    Raises a UserError if the options of `evaluate_parser` name nothing to evaluate, a CheckpointError if the run does
    not exist.
    """
    if options.run is not None:
        own = options.run / "config.yaml"
        if not own.exists():
            raise CheckpointError(f"{options.run}: no run there (no config.yaml); give a run's folder, or --checkpoint")
        options.config = options.config or own
    elif options.checkpoint is None or options.config is None:
        folders = [word for word in options.overrides if "=" not in word]
        meant = f"; write --run {folders[0]}" if folders else ""
        raise UserError(f"evaluate needs --run RUN, or --checkpoint FILE with --config FILE{meant}")


# Types of options. Each raises an ArgumentTypeError if the text is wrong; argparse turns it into the command's error.


def positive(text: str) -> int:
    """An option's integer from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def natural(text: str) -> int:
    """An option's integer from 0 on."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 0 on")
    return int(text)


def path_text(text: str) -> str:
    """An option's path, pattern or address. It expands a leading ~ or ~user that the shell has left as it is."""
    try:
        return with_home(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} {error}; a file of this name is ./{text}") from error


def part_of(text: str) -> tuple[int, int]:
    """The two numbers of an option I/N: part I, from 1 on, of N."""
    number, slash, parts = text.partition("/")
    if not (slash and number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I in 1..N, for example 1/4 to 4/4")
    return int(number), int(parts)


def bytes_of(suffix: str = "") -> Callable[[str], float]:
    """The type of an option that is a positive number with a unit and `suffix`, such as 80GB, in bytes."""

    def parse(text: str) -> float:
        match = re.fullmatch(rf"(\d+(?:\.\d+)?)\s*({'|'.join(BYTES)}){suffix}", text)
        if match is None or float(match[1]) <= 0:
            units = ", ".join(unit + suffix for unit in BYTES)
            raise argparse.ArgumentTypeError(f"{text!r} must be a positive number and one of {units}")
        return float(match[1]) * BYTES[match[2]]

    return parse


def refuse_existing(*outputs: Path) -> None:
    """Refuse to overwrite files. Raises a UserError if one of `outputs` exists."""
    for path in outputs:
        if path.exists():
            raise UserError(f"{path}: exists already; remove it or choose another --output")


def run_python(*arguments: str, cwd: Path, **environment: str) -> None:
    """Run this Python in a new process, which prints to this terminal. Raises a UserError if it fails."""
    if code := call_python(*arguments, cwd=cwd, **environment):
        raise UserError(f"{' '.join(arguments)}: ended with code {code}; see above")


def call_python(*arguments: str, cwd: Path, **environment: str) -> int:
    """As `run_python`, but return the exit code."""
    with subprocess.Popen([sys.executable, *arguments], cwd=cwd, env={**os.environ, **environment}) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.wait()  # Ctrl-C reaches the process too, which saves first. A second Ctrl-C ends both.
            raise


def usable_cores() -> int:
    """The cores that this process may use. On a cluster these can be fewer than the machine has."""
    return len(os.sched_getaffinity(0))


def markdown(rows: Iterable[Sequence[str]]) -> str:
    """A table of labels and values, without a header."""
    return "\n".join(["| | |", "|---|---|", *(f"| {label} | {value} |" for label, value in rows)])
