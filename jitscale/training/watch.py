"""Monitors of a run: skipped steps, bad samples, losses by noise level, loss spikes."""

import logging
import math
import statistics
from collections import deque
from collections.abc import Sequence

import torch

from jitscale import parallel
from jitscale.errors import DataError

logger = logging.getLogger(__name__)


class StepOutcomes:
    """Tells which steps moved the weights. On GPUs this is read some steps later, so that the host does not wait."""

    LATE = 2  # steps

    def __init__(self, device: torch.device) -> None:
        self._late = self.LATE if device.type == "cuda" else 0
        self._unread: deque[tuple[torch.Tensor, torch.cuda.Event | None]] = deque()

    def add(self, moved: torch.Tensor) -> list[bool]:
        """Add the last step's boolean (); returns the outcomes that are old enough to be read, oldest first."""
        copied = None
        if moved.device.type == "cuda":
            moved = moved.to("cpu", non_blocking=True)
            copied = torch.cuda.current_stream().record_event()
        self._unread.append((moved, copied))
        return self.settle(self._late)

    def settle(self, leave: int = 0) -> list[bool]:
        """The outcomes that were not read yet, except the `leave` newest; may wait for the device."""
        found = []
        while len(self._unread) > leave:
            moved, copied = self._unread.popleft()
            if copied is not None:
                copied.synchronize()
            found.append(bool(moved))
        return found


class BadSamples:
    """Counts the images that could not be decoded, and ends the run on all ranks if there are too many."""

    ALWAYS_ALLOWED = 10

    def __init__(self, fraction: float) -> None:
        """Allow `fraction` of the images seen."""
        self._fraction = fraction
        self._before = 0  # count of all ranks, up to the checkpoint from which this process resumed
        self.here = 0  # count of this rank since then
        self._reasons: list[str] = []

    def begin_again(self, before: int) -> None:
        """Continue from the count `before` of a checkpoint."""
        self._before, self.here = before, 0

    def note(self, reasons: list[str]) -> None:
        """Count this rank's bad samples, and log the reasons of the first ones."""
        self.here += len(reasons)
        for reason in reasons[: self.ALWAYS_ALLOWED - len(self._reasons)]:
            self._reasons.append(reason)
            logger.warning("%s; another sample replaces it", reason)

    def total(self) -> int:
        """The number over all ranks since the beginning of the run; a collective call."""
        return self._before + int(parallel.tally(torch.tensor([self.here]))[0])

    def check(self, here: int, images: int) -> int:
        """The total after `images` images, if `here` is the sum of all ranks' counts; a collective call.

        Raises a DataError on every rank if the total exceeds both `ALWAYS_ALLOWED` and the allowed fraction.
        """
        total = self._before + here
        if total > max(self.ALWAYS_ALLOWED, self._fraction * images):
            reasons = [reason for rank in parallel.gather_objects(self._reasons[:3]) for reason in rank]
            what = f"data.max_bad_fraction={self._fraction:g}: {total} of {images} images could not be decoded"
            remedy = "Check the shards with tools/index_shards.py --verify, or raise the limit"
            raise DataError(f"{what}, for example {'; '.join(reasons[:3])}. {remedy}")
        return total


class LossByNoiseLevel:
    """The mean loss in ten equal intervals of t since the last log point, kept on the device."""

    BINS = 10

    def __init__(self, device: torch.device) -> None:
        self._sums_and_counts = torch.zeros(2, self.BINS, device=device)

    def add(self, t: torch.Tensor, losses: torch.Tensor) -> None:
        """Add the `losses` (B,) of samples at times `t` (B,)."""
        bins = (t * self.BINS).long().clamp(0, self.BINS - 1)
        sums, counts = self._sums_and_counts
        sums.index_add_(0, bins, losses.detach().float())
        counts.index_add_(0, bins, torch.ones_like(losses, dtype=torch.float32))

    def take(self) -> torch.Tensor:
        """This rank's sums and counts, (2 * BINS,); resets them to zero."""
        taken = self._sums_and_counts.flatten().clone()
        self._sums_and_counts.zero_()
        return taken

    @classmethod
    def means(cls, taken: Sequence[float]) -> dict[str, float | None]:
        """`loss_t0` for t in [0, 0.1), ..., from the sum of all ranks' `take`; None if an interval had no sample."""
        pairs = enumerate(zip(taken[: cls.BINS], taken[cls.BINS :], strict=True))
        return {f"loss_t{k}": total / count if count else None for k, (total, count) in pairs}


class LossSpikes:
    """Finds a loss that is far above the last losses."""

    LEAST, MOST = 20, 100  # logged losses to compare with
    DEVIATIONS = 10.0

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=self.MOST)

    def record(self, loss: float) -> bool:
        """Keep `loss`; returns whether it is a spike.

        A spike lies more than `DEVIATIONS` robust standard deviations above the median of the last losses. The robust
        standard deviation is 1.4826 times the median absolute deviation, which earlier spikes do not increase.
        """
        if not math.isfinite(loss):
            return False  # `StepOutcomes` counts such a step as skipped
        spike = False
        if len(self._losses) >= self.LEAST:
            median = statistics.median(self._losses)
            spread = 1.4826 * statistics.median(abs(other - median) for other in self._losses)
            spike = loss > median + self.DEVIATIONS * max(spread, 1e-3 * abs(median))
        self._losses.append(loss)
        return spike
