"""The values that the ranks exchange at a log point, in one small collective."""

from typing import NamedTuple

import torch

from jitscale import parallel
from jitscale.training.timing import RankTimes
from jitscale.training.watch import LossByNoiseLevel


class LogPoint(NamedTuple):
    """The values that all ranks know after the exchange."""

    stop: bool  # any rank received a signal to stop
    writing: bool  # any rank still writes its file of a checkpoint
    bad_samples: int  # number over all ranks, counted as `BadSamples.here`
    rate: float  # images per second, by rank 0's clock
    loss: float  # loss of the output layer, mean over the batch
    middle_loss: float  # loss of the middle output layer; 0 without one
    loss_by_noise_level: dict[str, float | None]  # as `LossByNoiseLevel.means`
    slow_ranks: list[tuple[int, float, float]]  # as `RankTimes.slow_ranks`; known to rank 0 only


def exchange(
    *,
    stop: bool,
    writing: bool,
    bad_samples: int,
    rate: float,
    seconds: float,
    loss: torch.Tensor,
    losses: torch.Tensor,
) -> LogPoint:
    """Combine this rank's values with those of the others. A collective call; on a GPU it waits for the step.

    `seconds` comes from `RankTimes.take`, `losses` (2 * BINS,) from `LossByNoiseLevel.take`. `loss` (2,) is this rank's
    part of the two means.
    """
    of_main = rate if parallel.this_rank() == 0 else 0.0
    on_host = torch.tensor([stop, writing, bad_samples, of_main, seconds], dtype=torch.float64)
    on_device = torch.cat([loss.detach(), losses]).to("cpu", torch.float64)
    total, everyone = parallel.tally(torch.cat([on_host, on_device]))
    any_stop, any_writing, all_bad, rate, _, mean, middle, *summed = total.tolist()
    slow = RankTimes.slow_ranks(everyone[:, 4].tolist()) if parallel.this_rank() == 0 else []
    means = LossByNoiseLevel.means(summed)
    return LogPoint(bool(any_stop), bool(any_writing), int(all_bad), rate, mean, middle, means, slow)
