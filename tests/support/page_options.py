"""Checks the options and the environment variables that pages name."""

import argparse
import importlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from unittest import mock

from jitscale.errors import UserError
from jitscale.training import faults
from tests.support import ROOT
from tests.support.page_context import WrongCommandError
from tests.support.pages import tracked_files
from tests.support.stopped_parsers import parser_of, torchrun_parser

_NUMBER, _NAME, _COUNT_OF_NODES = r"\d+", r"\S+", r"\d+(?:-\d+)?"
_TIME = r"\d+|(?:\d+-)?\d+(?::\d\d){0,2}"
# The options of sbatch that pages use, and the form of the value; None: the option takes no value.
SBATCH = {
    **dict.fromkeys(("--nodes", "-N"), _COUNT_OF_NODES),
    **dict.fromkeys(("--time", "-t"), _TIME),
    **dict.fromkeys(("--ntasks-per-node", "--gpus-per-node", "--gpus-per-task", "--cpus-per-task"), _NUMBER),
    **dict.fromkeys(("--partition", "-p", "--account", "-A", "--qos", "--constraint", "-C", "--exclude", "-x"), _NAME),
    **dict.fromkeys(("--job-name", "-J", "--output", "--gres", "--export"), _NAME),
    **dict.fromkeys(("--exclusive", "--test-only", "--requeue"), None),
    "--array": r"\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*(?:%\d+)?",
    "--mem": r"\d+[KMGT]?",
    "--distribution": r"(?:\*|block|cyclic|plane=\d+|arbitrary)(?::(?:\*|block|cyclic|fcyclic))*",
    "--signal": r"(?:[RB]{0,2}:)?(?:[A-Z]+\d?|\d+)(?:@\d+)?",
    "--dependency": r"(?:after\w*:\d+(?::\d+)*|singleton)(?:,.*)?",
}
# Options in prose that belong to programs which are neither ours, nor sbatch, nor torchrun.
OF_OTHERS = {
    "--pty": "srun",
    "--batch": "scancel",
    "--flat": "data.py of StyleGAN",
    "--library": "tests/nullcuda/build.sh",
}
VARIABLE = re.compile(r"\bJITSCALE_[A-Z_]*[A-Z]")
_OPTION = re.compile(r"--[a-z][\w-]*")
_STARTED = ("jitscale.train", "jitscale.evaluate", "jitscale.launch.supervisor", "jitscale.launch.preflight")


def check_sbatch_option(option: str, value: str | None) -> None:
    """Check an option of sbatch and the form of its value. Raises a WrongCommandError."""
    if option not in SBATCH:
        raise WrongCommandError(f"{option}: not an option of sbatch that pages use; add it to SBATCH")
    form = SBATCH[option]
    if form is None and value:
        raise WrongCommandError(f"{option} takes no value")
    if form is not None and not re.fullmatch(form, value or ""):
        raise WrongCommandError(f"{option}={value}: is no value of this option of sbatch")


def check_named_option(option: str, value: str | None) -> None:
    """Check an option that stands alone in prose; `value` may be unknown. Raises a WrongCommandError."""
    actions = _all_options().get(option, ())
    if not actions and option in SBATCH:
        if value is not None:
            check_sbatch_option(option, value)
    elif not actions and option not in OF_OTHERS:
        raise WrongCommandError(f"{option}: is no option of a command of the project, of sbatch or of torchrun")
    elif actions and value is not None and all(_refuses(action, value) for action in actions):
        raise WrongCommandError(f"{option} {value}: is no choice of this option")


def _refuses(action: argparse.Action, value: str) -> bool:
    return action.choices is not None and value not in map(str, action.choices)


def check_options_in(words: list[str]) -> None:
    """Check the options among the words of code in prose. Raises a WrongCommandError."""
    for word, after in zip(words, [*words[1:], ""], strict=True):
        option, equals, value = word.partition("=")
        if _OPTION.fullmatch(option):
            follows = after if re.match(r"[a-z0-9]", after) else None
            check_named_option(option, value if equals else follows)


def check_options_of(main: Callable[[], object], words: Sequence[str]) -> None:
    """Check the names of the options of a command that is named in part. Raises a WrongCommandError."""
    known = _options_of([parser_of(main)])
    for word in words:
        option = word.partition("=")[0]
        if _OPTION.fullmatch(option) and option not in known:
            raise WrongCommandError(f"{option}: is no option of this command")


def check_variable(name: str) -> None:
    """Check the name of one of the project's variables. Raises a WrongCommandError."""
    if name not in _variables():
        raise WrongCommandError(f"{name}: nothing in the code reads this variable")


def check_faults(value: str) -> None:
    """Check the value of JITSCALE_FAULTS. Raises a WrongCommandError."""
    try:
        with mock.patch.dict(os.environ, {faults.VARIABLE: value}):
            faults.FaultInjection(0)
    except UserError as error:
        raise WrongCommandError(str(error)) from error


def check_null_gpu(words: list[str]) -> None:
    """Check the arguments of `python -m tests.nullcuda.check`. Raises a WrongCommandError."""
    main = importlib.import_module("tests.nullcuda.check").main
    with (
        mock.patch.dict(os.environ, {"LD_PRELOAD": ""}),  # without its library, the command ends after its checks
        mock.patch.object(sys, "argv", ["check", *words]),
        redirect_stdout(io.StringIO()),
        redirect_stderr(io.StringIO()) as said,
    ):
        try:
            main()
        except SystemExit:
            last = said.getvalue().strip().splitlines()[-1]
            if not last.endswith("start this through run.sh"):
                raise WrongCommandError(last) from None


@cache
def _all_options() -> dict[str, list[argparse.Action]]:
    """The options of all commands of the project and of torchrun, each with its forms."""
    tools = [path.stem for path in sorted((ROOT / "tools").glob("*.py")) if "__main__" in path.read_text()]
    with redirect_stdout(io.StringIO()):
        mains = [importlib.import_module(name).main for name in (*_STARTED, *tools)]
    status = importlib.import_module("submit").status
    check = ROOT / "tests/nullcuda/check.py"  # its parser is not one of the project's
    of_check = re.findall(r'add_argument\(\s*"(--[\w-]+)"', check.read_text())
    found = {option: [argparse.Action([option], "check")] for option in of_check}
    return found | _options_of([torchrun_parser(), parser_of(lambda: status([])), *map(parser_of, mains)])


def _options_of(parsers: Iterable[argparse.ArgumentParser]) -> dict[str, list[argparse.Action]]:
    """The options of parsers and of their subcommands."""
    found: dict[str, list[argparse.Action]] = {}
    waiting = list(parsers)
    while waiting:
        for action in waiting.pop()._actions:
            if isinstance(action, argparse._SubParsersAction):
                waiting += action.choices.values()
            for option in action.option_strings:
                found.setdefault(option, []).append(action)
    return found


@cache
def _variables() -> frozenset[str]:
    """The project's environment variables in code, job scripts and tests, besides the tests of pages."""
    of_pages = ("tests/docs/", "tests/support/page")
    names = [name for name in tracked_files() if name.startswith(("jitscale/", "slurm/", "tools/", "tests/"))]
    code = [name for name in names if name.endswith((".py", ".sh", ".def")) and not name.startswith(of_pages)]
    return frozenset(each for name in code for each in VARIABLE.findall((ROOT / name).read_text()))
