"""What the commands share: their parser, the types of their options, and a table for terminals and pages alike."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jitscale.errors import ExitCode, UserError


class Parser(argparse.ArgumentParser):
    """A parser whose help begins with a module's docstring, and whose errors are one line and exit code 2."""

    def __init__(self, description: str | None = None, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(description=description, **options)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong as `exit_with_message` would. Each rank says it: before ranks meet, none is the first."""
        self.exit(ExitCode.USER_ERROR, f"error: {message}; see --help\n")

    def add_overrides(self, meaning: str = "settings that win over the file") -> None:
        """Add the positional arguments `overrides`; `parse_intermixed_args` takes them between options too."""
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


# Types of options. Each raises ArgumentTypeError for another text, and argparse turns it into an error of the command.


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


def part_of(text: str) -> tuple[int, int]:
    """The two numbers of an option I/N: part I, from 1 on, of N."""
    number, slash, parts = text.partition("/")
    if not (slash and number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I in 1..N, for example 1/4 to 4/4")
    return int(number), int(parts)


def refuse_existing(*outputs: Path) -> None:
    """Refuse to write over files.

    Raises:
        UserError: one of `outputs` exists.
    """
    for path in outputs:
        if path.exists():
            raise UserError(f"{path}: exists already; remove it or choose another --output")


def run_python(*arguments: str, cwd: Path, **environment: str) -> None:
    """Run this Python in a process of its own, whose output is seen.

    Raises:
        UserError: it failed.
    """
    command, variables = [sys.executable, *arguments], {**os.environ, **environment}
    finished = subprocess.run(command, cwd=cwd, env=variables, check=False)
    if finished.returncode != 0:
        raise UserError(f"{' '.join(arguments)}: ended with code {finished.returncode}; see above")


def usable_cores() -> int:
    """The cores that this process may use: on a cluster, fewer than the machine has."""
    return len(os.sched_getaffinity(0))


def markdown(rows: Iterable[Sequence[str]]) -> str:
    """A table of labels and values, without a head."""
    return "\n".join(["| | |", "|---|---|", *(f"| {label} | {value} |" for label, value in rows)])
