"""Times of the parts of a measurement."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Durations in seconds by name, one for each time that a part ran.

    On GPUs a part ends when its kernels have. This waiting slows a step down, so a whole step is measured with
    `enabled` off.
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

    def medians(self) -> dict[str, float]:
        """Seconds by name."""
        return {name: statistics.median(measured) for name, measured in self.times.items()}


def wait_for(device: torch.device) -> None:
    """Wait until the kernels of a GPU have run."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
