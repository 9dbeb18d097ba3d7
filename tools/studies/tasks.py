"""Experiments: many small tasks in parallel, most of them runs of the real trainer and evaluation.

An experiment is a module of this folder: its tasks, a summary of their outcomes, a figure and a table. The outcome of
each task is kept in the task's folder, so an interrupted experiment continues and a figure needs no new training.
"""

import json
import multiprocessing
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import count, takewhile
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Protocol

from tqdm import tqdm

from jitscale import parallel
from jitscale.errors import ExitCode, UserError
from jitscale.files import atomic_write

OUTCOME = "outcome.json"

Outcomes = Mapping[str, Any]  # key: name of the task
Summary = Mapping[str, Any]  # summary of all outcomes; docs/experiments/NAME.json holds it
Shards = Sequence[tuple[str, int]]  # `digits` or `glyphs`, and pixels per side


@dataclass(frozen=True)
class Task(ABC):
    """A piece of work for one worker process. If the task trains, its outcome has `training_seconds`."""

    name: str  # also of its folder; unique in the experiment: WHAT_sSEED
    after: str | None = field(default=None, kw_only=True)  # the name of a task that must end first

    @abstractmethod
    def cost(self, folder: Path) -> int:
        """Its approximate duration, counted in trained images."""

    @abstractmethod
    def execute(self, folder: Path) -> dict[str, Any]:
        """Do the task in `folder` of the experiment (after an interruption, the rest); the outcome becomes JSON."""


class Experiment(Protocol):
    """A module of this folder. The first line of its docstring is its title."""

    __name__: str
    SHARDS: Shards  # data of its runs

    def tasks(self, seed: int) -> Sequence[Task]:
        """The tasks of one seed."""

    def summarise(self, outcomes: Outcomes) -> Summary:
        """The content of docs/experiments/NAME.json."""

    def draw(self, summary: Summary, path: Path) -> None:
        """Draw the figure of a summary."""

    def describe(self, summary: Summary) -> list[str]:
        """The lines of the table of a summary."""


def outcomes_of(tasks: Sequence[Task], folder: Path, workers: int, minutes: float = float("inf")) -> dict[str, Any]:
    """The outcomes by the names of the tasks, which run in `workers` processes with one thread each.

    Tasks begin in their order, except that one with `after` waits; none begins after `minutes`. `folder` is the
    experiment's. Raises a UserError if the time is not enough (the same call continues), or if a task fails.
    """
    files = {task.name: folder / task.name / OUTCOME for task in tasks}
    done = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    left = [task for task in tasks if task.name not in done]
    if not left:
        return done
    started = time.monotonic()
    os.environ["OMP_NUM_THREADS"] = "1"  # threads of each worker
    folder.mkdir(parents=True, exist_ok=True)
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=_begin_worker, initargs=(folder / "log.txt",))
    active: dict[Future[Any], Task] = {}
    total = sum(task.cost(folder) for task in left)
    with pool, tqdm(total=total, unit="img", unit_scale=True, desc=folder.name) as progress:
        try:
            while left or active:
                in_time = time.monotonic() - started < 60 * minutes
                for task in [task for task in left if task.after is None or task.after in done]:
                    if in_time and len(active) < workers:
                        left.remove(task)
                        active[pool.submit(_execute, task, folder)] = task
                if not active:
                    break
                for future in wait(active, return_when=FIRST_COMPLETED).done:
                    task = active.pop(future)
                    done[task.name] = future.result()
                    progress.set_postfix_str(task.name, refresh=False)
                    progress.update(task.cost(folder))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if left:
        runs = f"{len(left)} of {len(tasks)} runs"
        raise UserError(f"{runs} are left after {minutes:.3g} minutes; the same command continues")
    return done


def by_seed(outcomes: Outcomes, name: str) -> list[Any]:
    """The outcomes of the tasks NAME_sSEED, from seed 0 on."""
    names = takewhile(outcomes.__contains__, (f"{name}_s{seed}" for seed in count()))
    return [outcomes[name] for name in names]


def ends(outcomes: Outcomes, name: str, key: str) -> list[Any]:
    """`key` of the last measurements of the runs NAME_sSEED, from seed 0 on."""
    return [outcome["measurements"][-1][key] for outcome in by_seed(outcomes, name)]


def difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """The mean over seeds of second - first, and its standard error."""
    differences = [b - a for a, b in zip(first, second, strict=True)]
    error = stdev(differences) / sqrt(len(differences)) if len(differences) > 1 else 0.0
    return fmean(differences), error


def _begin_worker(log: Path) -> None:
    with log.open("a") as file:  # the terminal is the parent's
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    parallel.start(parallel.choose_device("cpu"))


def _end_with_parent() -> None:
    """If the parent is killed, the worker ends too, instead of finishing its task."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(ExitCode.FAILED)


def _execute(task: Task, folder: Path) -> dict[str, Any]:
    started = time.perf_counter()
    outcome = {"training_seconds": 0.0, **task.execute(folder)}
    outcome["measuring_seconds"] = time.perf_counter() - started - outcome["training_seconds"]
    (folder / task.name).mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / task.name / OUTCOME) as file:
        file.write(json.dumps(outcome, indent=2).encode())
    return outcome
