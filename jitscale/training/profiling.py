"""Profiles a few steps: a trace for a browser, and a table of the slowest kernels."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

FIRST, LAST = 20, 25  # steps of this process, after compilation and the first allocations
KERNELS = 20  # number of rows of the table

logger = logging.getLogger(__name__)


class StepProfile:
    """Profiles steps 20 to 25 of this process into `folder`.

    trace.json.gz    for chrome://tracing or ui.perfetto.dev
    kernels.txt      the twenty kernels that took the longest
    """

    def __init__(self, folder: Path, device: torch.device, *, active: bool) -> None:
        """`active`: whether this rank is profiled."""
        self._folder, self._device, self._active = folder, device, active
        self._step = 0
        self._profiler: profile | None = None

    @contextmanager
    def step(self) -> Iterator[None]:
        """The body of the `with` statement is a step."""
        self._step += 1
        if self._active and self._step == FIRST:
            device = ProfilerActivity.CUDA if self._device.type == "cuda" else ProfilerActivity.CPU
            self._profiler = profile(activities={ProfilerActivity.CPU, device})
            self._profiler.start()
        yield
        if self._step == LAST:
            self.close()

    def close(self) -> None:
        """Write the profile; if the run was too short, log a warning."""
        profiler, self._profiler = self._profiler, None
        active, self._active = self._active, False
        if profiler is None:
            if active and 0 < self._step < FIRST:
                logger.warning("run.profile: only %d steps; profiling begins at step %d", self._step, FIRST)
            return
        profiler.stop()
        order = f"self_{self._device.type}_time_total"
        table = profiler.key_averages().table(sort_by=order, row_limit=KERNELS, max_name_column_width=80)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(self._folder / "trace.json.gz"))
            (self._folder / "kernels.txt").write_text(table + "\n")
        except OSError as error:
            logger.error("run.profile: cannot be written (%s); training goes on", error)
            return
        logger.info("steps %d to %d profiled into %s", FIRST, self._step, self._folder)
