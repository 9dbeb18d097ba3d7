"""Times of the parts of what is measured."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


class Stopwatch:
    """Durations in seconds by name, one for each time that a part ran.

    On GPUs a part ends when its kernels have: waiting for that slows a step down, so that the whole of it is measured
    with `enabled` off.
    """

    def __init__(self, device: torch.device, *, enabled: bool = True) -> None:
        self.times: dict[str, list[float]] = defaultdict(list)
        self.enabled = enabled
        self._device = device

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time the body of the `with` statement."""
        if not self.enabled:
            yield
            return
        wait_for(self._device)
        started = time.perf_counter()
        yield
        wait_for(self._device)
        self.times[name].append(time.perf_counter() - started)

    def timed(self, call: Callable[P, T], name: str) -> Callable[P, T]:
        """`call`, timed as the part `name`."""

        def timed(*arguments: P.args, **named: P.kwargs) -> T:
            with self.part(name):
                return call(*arguments, **named)

        return timed

    def timed_each(self, items: Iterator[T], name: str) -> Iterator[T]:
        """The same items; waiting for one is the part `name`."""
        while True:
            with self.part(name):
                item = next(items)
            yield item


def wait_for(device: torch.device) -> None:
    """Until the kernels of a GPU have run."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
