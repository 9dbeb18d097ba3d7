"""Run commands of tools/ in the process of the test, without a new interpreter and its imports."""

import io
import os
import runpy
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from unittest import mock

from tests.support import ROOT


@dataclass
class Finished:
    """The exit code and the output of a command."""

    code: int
    out: str
    err: str


def run_tool(name: str, *arguments: object) -> Finished:
    """Run `python tools/NAME.py ARGUMENTS...` in the project's root, to the point where its process would end."""
    out, err = io.StringIO(), io.StringIO()
    here = os.getcwd()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    os.chdir(ROOT)
    try:
        with (
            redirect_stdout(out),
            redirect_stderr(err),
            mock.patch.object(sys, "argv", [f"tools/{name}.py", *map(str, arguments)]),
            mock.patch.object(os, "_exit", sys.exit),
        ):
            runpy.run_path(sys.argv[0], run_name="__main__")
            code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        os.chdir(here)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return Finished(code, out.getvalue(), err.getvalue())
