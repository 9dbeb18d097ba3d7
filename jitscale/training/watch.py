"""What a run watches: skipped steps, bad samples, losses by noise level, spikes."""

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
    """Whether steps moved the weights; on GPUs read some steps later, since the host would wait for the newest one."""

    LATE = 2  # steps

    def __init__(self, device: torch.device) -> None:
        self._late = self.LATE if device.type == "cuda" else 0
        self._unread: deque[tuple[torch.Tensor, torch.cuda.Event | None]] = deque()

    def add(self, moved: torch.Tensor) -> list[bool]:
        """Note the last step's boolean (); returns the outcomes that are old enough to be read, oldest first."""
        copied = None
        if moved.device.type == "cuda":
            moved = moved.to("cpu", non_blocking=True)
            copied = torch.cuda.current_stream().record_event()
        self._unread.append((moved, copied))
        return self.settle(self._late)

    def settle(self, leave: int = 0) -> list[bool]:
        """All that were not read yet, but the `leave` newest; may wait for the device."""
        found = []
        while len(self._unread) > leave:
            moved, copied = self._unread.popleft()
            if copied is not None:
                copied.synchronize()
            found.append(bool(moved))
        return found


class BadSamples:
    """Counts the images that could not be decoded, and ends the run on all ranks if they are too many."""

    ALWAYS_ALLOWED = 10

    def __init__(self, fraction: float) -> None:
        """`fraction` of the images seen is allowed."""
        self._fraction = fraction
        self._before = 0  # counted by all ranks until the checkpoint that this process began from
        self.here = 0  # counted by this rank since then
        self._reasons: list[str] = []

    def begin_again(self, before: int) -> None:
        """Count from a checkpoint that has counted `before`."""
        self._before, self.here = before, 0

    def note(self, reasons: list[str]) -> None:
        """Count this rank's bad samples, and say what is wrong with the first ones."""
        self.here += len(reasons)
        for reason in reasons[: self.ALWAYS_ALLOWED - len(self._reasons)]:
            self._reasons.append(reason)
            logger.warning("%s; another sample stands in for it", reason)

    def total(self) -> int:
        """Over all ranks since the beginning of the run; a collective call."""
        return self._before + int(parallel.tally(torch.tensor([self.here]))[0])

    def check(self, here: int, images: int) -> int:
        """The total after `images` images, where all ranks together have counted `here`; a collective call.

        Raises a DataError on every rank if it is more than `ALWAYS_ALLOWED` and more than the allowed fraction.
        """
        total = self._before + here
        if total > max(self.ALWAYS_ALLOWED, self._fraction * images):
            reasons = [reason for rank in parallel.gather_objects(self._reasons[:3]) for reason in rank]
            what = f"data.max_bad_fraction={self._fraction:g}: {total} of {images} images could not be decoded"
            remedy = "Check the shards with tools/index_shards.py --verify, or raise the limit"
            raise DataError(f"{what}, such as {'; '.join(reasons[:3])}. {remedy}")
        return total


class LossByNoiseLevel:
    """The mean loss in ten equal intervals of t since the last log point, kept on the device."""

    BINS = 10

    def __init__(self, device: torch.device) -> None:
        self._sums_and_counts = torch.zeros(2, self.BINS, device=device)

    def add(self, t: torch.Tensor, losses: torch.Tensor) -> None:
        """Count the `losses` (B,) of samples at times `t` (B,)."""
        bins = (t * self.BINS).long().clamp(0, self.BINS - 1)
        sums, counts = self._sums_and_counts
        sums.index_add_(0, bins, losses.detach().float())
        counts.index_add_(0, bins, torch.ones_like(losses, dtype=torch.float32))

    def take(self) -> torch.Tensor:
        """This rank's sums and counts, (2 * BINS,); the next ones begin at zero."""
        taken = self._sums_and_counts.flatten().clone()
        self._sums_and_counts.zero_()
        return taken

    @classmethod
    def means(cls, taken: Sequence[float]) -> dict[str, float | None]:
        """`loss_t0` for t in [0, 0.1), ..., None where there was no sample, from the ranks' summed `take`."""
        pairs = enumerate(zip(taken[: cls.BINS], taken[cls.BINS :], strict=True))
        return {f"loss_t{k}": total / count if count else None for k, (total, count) in pairs}


class LossSpikes:
    """Finds a loss that is far above the last ones."""

    LEAST, MOST = 20, 100  # logged losses to compare with
    DEVIATIONS = 10.0

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=self.MOST)

    def record(self, loss: float) -> bool:
        """Keep `loss`; returns whether it is a spike.

        A spike lies more than `DEVIATIONS` robust standard deviations above the median of the last losses. The robust
        standard deviation is 1.4826 times the median absolute deviation, which spikes do not widen.
        """
        if not math.isfinite(loss):
            return False  # such a step is skipped, and counted elsewhere
        spike = False
        if len(self._losses) >= self.LEAST:
            median = statistics.median(self._losses)
            spread = 1.4826 * statistics.median(abs(other - median) for other in self._losses)
            spike = loss > median + self.DEVIATIONS * max(spread, 1e-3 * abs(median))
        self._losses.append(loss)
        return spike
