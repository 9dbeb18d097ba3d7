"""A forked rank behaves like an interpreter that a user starts."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.forking import Process

SAY = "import os, sys; print(__name__, sys.argv[1:], os.getcwd(), sorted(os.environ), os.environ['WORD'])"
PROGRAMS = {
    "ends": f"{SAY}; print('from its end', file=sys.stderr)",
    "exits": f"{SAY}; sys.exit(75)",
    "says why": f"{SAY}; sys.exit('one line')",
    "leaves at once": f"{SAY}; sys.stdout.flush(); os._exit(2)",
    "fails": f"{SAY}; sys.stdout.flush(); raise ValueError('of its own')",
    "is killed": f"{SAY}; sys.stdout.flush(); os.kill(os.getpid(), 9)",
    "runs functions at its end": f"{SAY}; import atexit; atexit.register(print, 'last')",
}


@pytest.mark.parametrize("kind", ["code", "file", "module"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_fork_behaves_like_a_new_interpreter(name: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / "a_program.py").write_text(PROGRAMS[name])
    environment = {"PYTHONPATH": str(tmp_path), "WORD": "a word", "LC_CTYPE": "C.UTF-8"}
    command = {
        "code": ["-c", PROGRAMS[name]],
        "file": [str(tmp_path / "a_program.py")],
        "module": ["-m", "a_program"],
    }[kind]
    command = [*command, "--an-option", "7"]
    started = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    fork = Process(command, environment)
    said, _ = fork.communicate(timeout=60)
    assert fork.returncode == started.returncode
    ours, theirs = said.splitlines(), started.stdout.splitlines()
    if name == "fails":  # The stack frames differ.
        assert (ours[0], ours[-1]) == (theirs[0], theirs[-1])
    else:  # Some import makes the standard output flush each line, so both outputs mix in another order.
        assert sorted(ours) == sorted(theirs)


def test_signals_and_timeouts_of_a_fork() -> None:
    fork = Process(["-c", "import time; print('here', flush=True); time.sleep(60)"])
    assert fork.stdout.readline() == "here\n"
    assert fork.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        fork.wait(0.1)
    with pytest.raises(subprocess.TimeoutExpired):
        fork.communicate(timeout=0.1)
    fork.terminate()
    assert fork.wait(10) == fork.poll() == -signal.SIGTERM
    fork.kill()  # A process that has ended ignores the signal.
    with pytest.raises(ProcessLookupError):
        os.kill(fork.pid, 0)
