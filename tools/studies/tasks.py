"""Experiments: many small tasks, most of them runs of the real trainer and evaluation, side by side on the cores.

An experiment is a list of tasks and a figure of what was measured. What a task has measured is kept in its folder, so
that an experiment that was stopped goes on, and a figure is drawn again without training anything.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from jitscale import parallel
from jitscale.errors import ExitCode, UserError
from jitscale.files import atomic_write

OUTCOME = "outcome.json"

Outcomes = Mapping[str, Any]  # name of a task -> what its execution returns


class Task(Protocol):
    """What a worker does in one go. Its outcome has `training_seconds` and `measuring_seconds`, and can be JSON."""

    @property
    def name(self) -> str:
        """Unique in the experiment; its folder's."""

    @property
    def after(self) -> str | None:
        """The name of the task that must have been done before."""

    def cost(self, folder: Path) -> int:
        """In images trained, about."""

    def execute(self, folder: Path) -> dict[str, Any]:
        """Do it in `folder` of the experiment, from where it was left; returns the outcome."""


@dataclass(frozen=True)
class Experiment:
    """What `tools/experiments.py NAME` does.

    Attributes:
        title: one line.
        tools: commands that write the shards, as the arguments of Python.
        tasks: number of seeds -> all of them.
        summarise: outcomes -> what docs/experiments/NAME.json holds.
        draw: that and a path -> a figure.
        describe: that -> lines to print.
    """

    title: str
    tools: Sequence[Sequence[str]]
    tasks: Callable[[int], Sequence[Task]]
    summarise: Callable[[Outcomes], dict[str, Any]]
    draw: Callable[[Mapping[str, Any], Path], None]
    describe: Callable[[Mapping[str, Any]], list[str]]


def outcomes_of(tasks: Sequence[Task], folder: Path, workers: int, minutes: float | None = None) -> dict[str, Any]:
    """What was measured, by the name of the task, in as many processes as `workers`, each with one thread.

    Args:
        tasks: those that others come after among them.
        folder: of the experiment.
        workers: processes.
        minutes: after which no further task begins.

    Raises:
        UserError: the time was not enough; the same call goes on. Or a task failed.
    """
    done = {
        task.name: json.loads(path.read_text()) for task in tasks if (path := folder / task.name / OUTCOME).exists()
    }
    left = [task for task in tasks if task.name not in done]
    if not left:
        return done
    started = time.monotonic()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers
    folder.mkdir(parents=True, exist_ok=True)
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=_begin_worker, initargs=(folder / "log.txt",))
    active: dict[Future[Any], Task] = {}
    total = sum(task.cost(folder) for task in left)
    with pool, tqdm(total=total, unit="img", unit_scale=True, desc=folder.name) as progress:
        try:
            while left or active:
                in_time = minutes is None or time.monotonic() - started < 60 * minutes
                for task in [task for task in left if task.after is None or task.after in done]:
                    if in_time and len(active) < workers:
                        left.remove(task)
                        active[pool.submit(_execute, task, folder)] = task
                if not active:
                    break
                finished, _ = wait(active, return_when=FIRST_COMPLETED)
                for future in finished:
                    task = active.pop(future)
                    done[task.name] = future.result()
                    progress.set_postfix_str(task.name, refresh=False)
                    progress.update(task.cost(folder))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if left:
        raise UserError(
            f"{len(left)} of {len(tasks)} runs are left after {minutes:.3g} minutes; the same command goes on"
        )
    return done


def by_seed(outcomes: Outcomes, name: str) -> list[Any]:
    """The outcomes of `name` over all seeds: tasks are named NAME_sSEED."""
    found: list[Any] = []
    while f"{name}_s{len(found)}" in outcomes:
        found.append(outcomes[f"{name}_s{len(found)}"])
    return found


def _begin_worker(log: Path) -> None:
    with log.open("a") as file:  # the terminal is the parent's
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    parallel.start(parallel.choose_device("cpu"))


def _end_with_parent() -> None:
    """A worker would otherwise train on to the end of its task when the parent is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(ExitCode.FAILED)


def _execute(task: Task, folder: Path) -> dict[str, Any]:
    outcome = task.execute(folder)
    (folder / task.name).mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / task.name / OUTCOME) as file:
        file.write(json.dumps(outcome, indent=2).encode())
    return outcome
