"""Worker processes that read ahead of the training process, by PyTorch's DataLoader: their life, and their death."""

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

BATCHES_AHEAD = 2  # of each worker: DataLoader's prefetch_factor

_SECONDS_TO_END = 5.0  # that a worker has between SIGTERM and SIGKILL


def start_workers(dataset: Dataset[T | DataError], num_workers: int, **options: Any) -> Generator[T, None, None]:
    """Start processes that read ahead, as `DataLoader` with `options`; they end with the generator that is returned.

    With 0 workers this process reads. `dataset` returns a `DataError`; raised, it would reach the user in a worker's
    traceback. Iterating raises it here, and a DataError at a dead worker. Raises what `check_socket_folder` does.
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
        generator=torch.Generator(),  # its seed is drawn from here, not from the training process's generator
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
        del batches  # now and not with some traceback: until then PyTorch raises what it hears of dead workers
        for worker in workers:
            # PyTorch has ended it, unless a traceback that somebody keeps holds its iterator.
            if worker.is_alive():
                worker.terminate()
                worker.join(_SECONDS_TO_END)
            if worker.is_alive():
                worker.kill()
                worker.join()


def _next_or_error(batches: Iterator[T | DataError], workers: list[BaseProcess]) -> T | DataError | None:
    """The next batch, or None after the last one, or what is wrong, without a traceback that would keep `batches`."""
    try:
        return next(batches, None)
    except (RuntimeError, OSError, EOFError):  # the last two: of a connection to a worker that has just died
        for worker in workers:
            worker.join(timeout=0.5)
            if worker.exitcode is not None:
                return _dead_worker(f"DataLoader worker (pid {worker.pid}) ended with exit code {worker.exitcode}")
        raise


@contextmanager
def naming_dead_workers(saying: Callable[[], AbstractContextManager[object]] = nullcontext) -> Iterator[None]:
    """Turn PyTorch's report of a dead worker, which it may raise anywhere in the main thread, into a `DataError`.

    It is raised within `saying`.
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
    """A scheduler signals every process of a job; the training process saves, and needs batches until it has.

    Only while the loader closes is SIGTERM obeyed: PyTorch sends it to workers that do not end by themselves.
    """

    def obey_if_closing(number: int, frame: FrameType | None) -> None:
        if closing.is_set():
            os._exit(0)

    signal.signal(signal.SIGTERM, obey_if_closing)
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
