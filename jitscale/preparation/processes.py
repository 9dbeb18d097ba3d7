"""Worker processes: each does one task at a time, none outlives this process, and any of them may die at any time."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import NoReturn, TypeVar

from jitscale.errors import DataError
from jitscale.files import check_socket_folder

Task = TypeVar("Task")
Result = TypeVar("Result")

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # they ask the whole group of processes to stop
_STOP_SECONDS = 10.0  # a worker finishes its current image within this time
# The exit code that we see if a thread of the pool, which also waits for the processes, has read the real one.
_READ_BY_ANOTHER = 255
_SIGNAL_SECONDS = 1.0  # a signal to a group reaches all its processes within this time


class WorkerDiedError(DataError):
    """A worker process died. `what` says how; a message begins with it."""

    def __init__(self, pid: int, what: str, workers: int) -> None:
        super().__init__(f"{what}; start again, maybe with fewer --workers than {workers}")
        self.pid, self.what = pid, what


def in_processes(
    work: Callable[[Task], Result], tasks: Iterable[Task], workers: int, preload: Sequence[str] = ()
) -> Generator[tuple[int, Result], None, None]:
    """Run `work(task)` for every task in at most `workers` processes; yields number and result as tasks finish.

    If there is one worker or one task, this process does the work itself. The processes end with the generator. `work`
    is a function of a module. An error of `work` is raised here, and the other tasks are cancelled. `tasks` are read as
    they are needed. `preload` names modules that `work` imports: the workers share their memory. Raises a
    WorkerDiedError if a process died, and the errors of `check_socket_folder`.
    """
    numbered = enumerate(tasks)
    first = list(islice(numbered, 2 * workers))
    if workers == 1 or len(first) <= 1:
        for number, task in chain(first, numbered):
            yield number, work(task)
        return

    check_socket_folder()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([work.__module__, *preload])
    resource_tracker.ensure_running()  # starting it unblocks the signals
    others = set(multiprocessing.active_children())
    team: set[BaseProcess] = set()
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker)
    running: dict[Future[Result], int] = {}

    def submit(more: Iterable[tuple[int, Task]]) -> None:
        # This may start processes. They inherit the block, and unblock the signals once they handle them. The server
        # that forks the workers never unblocks them, so it outlives the workers.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
        try:
            for number, task in more:
                running[pool.submit(_run, work, task)] = number
                team.update(set(multiprocessing.active_children()) - others)  # at once: dead processes are not listed
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    try:
        submit(first)
        while running:
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            submit(islice(numbered, len(done)))
            for future in done:
                yield running.pop(future), future.result()
    except BrokenProcessPool as error:
        _stop(team)
        raise _death(team) from error
    finally:
        _stop(team)
        pool.shutdown(cancel_futures=True)


def _stop(team: Iterable[BaseProcess]) -> None:
    for process in team:
        process.terminate()
    for process in team:
        process.join(_STOP_SECONDS)
        process.kill()


def _death(team: Collection[BaseProcess]) -> WorkerDiedError:
    ended = [process for process in team if process.exitcode not in (None, 0, -signal.SIGTERM)]
    dead = min(ended, key=lambda one: one.exitcode == _READ_BY_ANOTHER, default=None)
    if dead is None:
        time.sleep(_SIGNAL_SECONDS)  # the whole group was asked to stop: this process's own signal may come a bit later
    process = dead or min(team, key=lambda one: one.pid or 0)
    code = process.exitcode or 0
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    why = " (often: too little memory)" if -code == signal.SIGKILL else ""
    return WorkerDiedError(process.pid or 0, f"worker process {process.pid}: {how}{why}", len(team))


def _start_worker() -> None:
    """Make this worker end at the SIGTERM of the main process, and when the main process ends for any reason."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)


def _run(work: Callable[[Task], Result], task: Task) -> Result:
    """Run `work(task)` in a worker process. SIGTERM unwinds it, so that it leaves no partial files."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not interrupt the unwinding
        sys.exit()

    signal.signal(signal.SIGTERM, leave)
    try:
        return work(task)
    except SystemExit:
        os._exit(0)  # else the executor would start the next task
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
