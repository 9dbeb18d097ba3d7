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
_STOP_SECONDS = 10.0  # a worker finishes the image at hand within this
# The exit code of a process whose own one was read by another thread: the pool's waits for the processes too.
_READ_BY_ANOTHER = 255
_SIGNAL_SECONDS = 1.0  # between the arrival of a signal at two processes of a group


class WorkerDiedError(DataError):
    """A worker process died. `what` says how, to begin a message with."""

    def __init__(self, pid: int, what: str, workers: int) -> None:
        super().__init__(f"{what}; start again, maybe with fewer --workers than {workers}")
        self.pid, self.what = pid, what


def in_processes(
    work: Callable[[Task], Result], tasks: Iterable[Task], workers: int, preload: Sequence[str] = ()
) -> Generator[tuple[int, Result], None, None]:
    """`work(task)` of every task with the task's number, as they are finished, by at most `workers` processes.

    One worker, or the worker of a single task, is this process itself. The processes end with the generator. `work` is
    a function of a module. What it raises is raised here, and ends the other tasks. `tasks` are read as they are
    needed. Of `preload`, the modules that `work` imports, all workers share the memory. Raises a WorkerDiedError if a
    process died, and what `check_socket_folder` does.
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
        # This may start processes. They inherit that signals wait, until they handle them. The server that forks the
        # workers never handles them, so it outlives the workers.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
        try:
            for number, task in more:
                running[pool.submit(_run, work, task)] = number
                team.update(set(multiprocessing.active_children()) - others)  # at once: one that dies is not listed
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
        time.sleep(_SIGNAL_SECONDS)  # all were asked to stop, and so is this process: its own signal may come later
    process = dead or min(team, key=lambda one: one.pid or 0)
    code = process.exitcode or 0
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    why = " (often: too little memory)" if -code == signal.SIGKILL else ""
    return WorkerDiedError(process.pid or 0, f"worker process {process.pid}: {how}{why}", len(team))


def _start_worker() -> None:
    """End on SIGTERM, which the main process sends, and with the main process, however that ends."""
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
    """`work(task)` in a worker process; SIGTERM unwinds it, so that it leaves no partial files."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not interrupt the unwinding
        sys.exit()

    signal.signal(signal.SIGTERM, leave)
    try:
        return work(task)
    except SystemExit:
        os._exit(0)  # the executor would go on with the next task
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
