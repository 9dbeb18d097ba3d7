"""The speed of a run: images per second, and ranks that slow down the others."""

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm


class RankTimes:
    """Compares the ranks by the time until the first collective of a step: waiting for data plus the forward pass.

    A whole step takes the same time on all ranks, because they wait for the slowest. In ZeRO stage 3 the forward pass
    has collectives too, so that only the time of waiting for data differs.
    """

    FACTOR = 1.5  # a slow rank takes more than this times the median
    LEAST_SECONDS = 0.01  # a smaller difference from the median is noise

    def __init__(self, device: torch.device, parts: int) -> None:
        """`parts`: how often `part` is entered in a step."""
        self._on_gpu = device.type == "cuda"
        self._parts_in_step, self._parts = parts, 0
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def part(self) -> Iterator[None]:
        """Measure the body of the `with` statement; the host does not wait for a GPU."""
        started = time.perf_counter()
        self._parts += 1
        if self._on_gpu:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            yield
            self._seconds += time.perf_counter() - started

    def take(self) -> float:
        """This rank's mean seconds per step since the last call."""
        for begin, end in self._events:
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1e3
        mine = self._seconds * self._parts_in_step / max(1, self._parts)
        self._seconds, self._parts, self._events = 0.0, 0, []
        return mine

    @classmethod
    def slow_ranks(cls, everyone: Sequence[float]) -> list[tuple[int, float, float]]:
        """(rank, its seconds per step, the median over ranks) of ranks that are much slower than the median."""
        median = statistics.median_low(everyone)
        limit = max(cls.FACTOR * median, median + cls.LEAST_SECONDS)
        return [(rank, seconds, median) for rank, seconds in enumerate(everyone) if seconds > limit]


class Clock:
    """Images per second between log points, without the time spent on saves, measurements and pictures."""

    def __init__(self, images: int) -> None:
        """Start with `images` images seen."""
        self.bar: tqdm[Any] | None = None  # the progress bar, whose estimate ignores the same time
        self.restart(images)

    def restart(self, images: int) -> None:
        """Start again from `images` images seen."""
        self._began, self._images = time.perf_counter(), images

    @contextmanager
    def stopped(self, doing: str = "save") -> Iterator[None]:
        """The body of the `with` statement does not count; meanwhile the progress bar shows `doing`."""
        stopped, bar = time.perf_counter(), None if self.bar is None or self.bar.disable else self.bar
        if bar is not None:
            usual = bar.desc
            bar.set_description_str(doing)
        try:
            yield
        finally:
            seconds = time.perf_counter() - stopped
            self._began += seconds
            if bar is not None:
                bar.start_t, bar.last_print_t = bar.start_t + seconds, bar.last_print_t + seconds
                bar.set_description_str(usual)

    def take_rate(self, images: int) -> float:
        """Images per second since the last call or restart."""
        rate = (images - self._images) / (time.perf_counter() - self._began)
        self.restart(images)
        return rate
