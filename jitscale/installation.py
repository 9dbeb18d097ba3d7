"""The message of a command whose packages are not installed. It runs on any Python 3 without other packages."""

import os
import sys
from types import TracebackType

REMEDY = "activate the environment (source .venv/bin/activate), or make it first (make install)"
USER_ERROR = 2  # ExitCode.USER_ERROR; that module is not imported here


def explain_missing_packages() -> None:
    """From now on, a missing package ends this process with one line and the exit code of a user error."""
    sys.excepthook = _explain


def _explain(kind: type[BaseException], error: BaseException, trace: "TracebackType | None") -> None:
    if not isinstance(error, ModuleNotFoundError) or (error.name or "jitscale").partition(".")[0] == "jitscale":
        sys.__excepthook__(kind, error, trace)
        return
    print(f"error: {error} in {sys.executable}; {REMEDY}", file=sys.stderr, flush=True)
    os._exit(USER_ERROR)
