"""Start real processes on the CPU and wait for them."""

import os
import socket
import sys
import time
from collections.abc import Callable

from tests.support import ROOT
from tests.support.forking import PYTHONPATH, Process

PROGRAMS = ROOT / "tests/distributed/programs"


def rank_environments(world_size: int) -> list[dict[str, str]]:
    """The environment of each rank, as torchrun sets it. Each rank has one thread, so that sums are equal."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"WORLD_SIZE": str(world_size), "PYTHONPATH": PYTHONPATH}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]


def start_ranks(world_size: int, *command: str) -> list[Process]:
    """Start `python COMMAND...` on every rank. Its stdout and stderr go into one pipe."""
    return [Process(command, env) for env in rank_environments(world_size)]


def run_ranks(world_size: int, *command: str, timeout: float = 300, expect: int = 0) -> str:
    """Run `python COMMAND...` on every rank to its end; returns the output of rank 0."""
    ranks = start_ranks(world_size, *command)
    try:
        outputs = [rank.communicate(timeout=timeout)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    codes = [rank.returncode for rank in ranks]
    assert codes == [expect] * world_size, f"exit codes {codes}\n" + "\n".join(outputs)
    return outputs[0]


def leave_after(main: Callable[[], object]) -> None:
    """Run a program of a rank, and skip the interpreter's teardown, as the commands of the project do.

    During the teardown, running threads of communication libraries can abort a process whose work is done.
    """
    main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def group_ended(leader: int, seconds: float = 15.0) -> bool:
    """Whether all processes of the group of `leader` end within `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.killpg(leader, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False
