"""Worker processes that read ahead of the training process (PyTorch's DataLoader): start, signals and end."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from types import FrameType
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from jitscale.errors import DataError
from jitscale.files import check_socket_folder

T = TypeVar("T")

BATCHES_AHEAD = 2  # per worker: DataLoader's prefetch_factor

_SECONDS_TO_END = 5.0  # for a worker, between SIGTERM and SIGKILL


def start_workers(dataset: Dataset[T | DataError], num_workers: int, **options: Any) -> Generator[T, None, None]:
    """Start processes that read ahead, as a `DataLoader` with `options`. They end with the returned generator.

    With 0 workers, this process reads. `dataset` must return a `DataError`, not raise it: otherwise the user would see
    the traceback of a worker. The generator raises it, and also a DataError if a worker has died. Raises what
    `check_socket_folder` raises.
    """
    if num_workers:
        check_socket_folder()
    closing = multiprocessing.Event()
    loader: DataLoader[T | DataError] = DataLoader(
        dataset,
        batch_size=None,
        collate_fn=_unchanged,
        num_workers=num_workers,
        prefetch_factor=BATCHES_AHEAD if num_workers else None,
        worker_init_fn=partial(_leave_signals_to_the_trainer, closing),
        generator=torch.Generator(),  # a separate generator, so that torch's global one is not advanced
        **options,
    )
    others = multiprocessing.active_children()
    batches = iter(loader)
    workers = [process for process in multiprocessing.active_children() if process not in others]
    return _until_closed(batches, workers, closing)


def _unchanged(batch: T) -> T:
    return batch


def _until_closed(
    batches: Iterator[T | DataError], workers: list[BaseProcess], closing: Event
) -> Generator[T, None, None]:
    try:
        while (batch := _next_or_error(batches, workers)) is not None:
            if isinstance(batch, DataError):
                raise batch
            yield batch
    finally:
        closing.set()
        del batches  # PyTorch stops its workers only when the iterator is garbage-collected
        for worker in workers:
            # A stored traceback may keep the iterator alive, and then the workers still run.
            if worker.is_alive():
                worker.terminate()
                worker.join(_SECONDS_TO_END)
            if worker.is_alive():
                worker.kill()
                worker.join()


def _next_or_error(batches: Iterator[T | DataError], workers: list[BaseProcess]) -> T | DataError | None:
    """The next batch, None after the last one, or the error, without a traceback that would keep `batches` alive."""
    try:
        return next(batches, None)
    except (RuntimeError, OSError, EOFError):  # the last two come from the connection to a dead worker
        for worker in workers:
            worker.join(timeout=0.5)
            if worker.exitcode is not None:
                return _dead_worker(f"DataLoader worker (pid {worker.pid}) ended with exit code {worker.exitcode}")
        raise


@contextmanager
def naming_dead_workers(saying: Callable[[], AbstractContextManager[object]] = nullcontext) -> Iterator[None]:
    """Turn PyTorch's report of a dead worker into a `DataError`. PyTorch may raise it anywhere in the main thread.

    The DataError is raised within the context `saying`.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        with saying():
            raise _dead_worker(str(error)) from error


def _dead_worker(what: str) -> DataError:
    remedy = "lower data.num_workers or engine.micro_batch_size, then start the same command again"
    said = " ".join(what.split()).rstrip(".")
    return DataError(f"data.num_workers: {said}. Out of memory is the usual cause: {remedy}")


def _leave_signals_to_the_trainer(closing: Event, worker: int) -> None:
    """Ignore a scheduler's signals, which go to every process: the training process needs batches until it has saved.

    A worker obeys SIGTERM only while the loader closes: PyTorch sends it to workers that do not end by themselves.
    """

    def obey_if_closing(number: int, frame: FrameType | None) -> None:
        if closing.is_set():
            os._exit(0)

    signal.signal(signal.SIGTERM, obey_if_closing)
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
