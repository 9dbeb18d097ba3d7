"""Communication between ranks: one small exchange at a log point, and work that one rank of a node does for all."""

import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from jitscale import parallel
from jitscale.errors import UserError
from jitscale.node import once_a_node
from jitscale.training.log_point import exchange
from jitscale.training.watch import LossByNoiseLevel
from tests.support.processes import leave_after


def main() -> None:
    """Check on every rank. Each rank that calls the work leaves a file."""
    folder = Path(sys.argv[1])
    (folder / "tmp").mkdir(exist_ok=True)
    tempfile.tempdir = str(folder / "tmp")
    with parallel.joined(torch.device("cpu")) as world:
        losses = LossByNoiseLevel(world.device)
        losses.add(torch.tensor([0.05]), torch.tensor([1.0 + world.rank]))
        slowest = world.rank == world.size - 1
        found = exchange(
            stop=world.rank == 1,
            writing=False,
            bad_samples=world.rank,
            rate=10.0 + world.rank,
            seconds=1.0 if slowest else 0.1,
            loss=torch.tensor([0.5, 0.25]),
            losses=losses.take(),
        )
        assert found.stop
        assert not found.writing
        assert found.bad_samples == sum(range(world.size))
        assert found.rate == 10.0
        assert (found.loss, found.middle_loss) == (0.5 * world.size, 0.25 * world.size)
        assert found.loss_by_noise_level["loss_t0"] == 1.0 + (world.size - 1) / 2
        assert found.loss_by_noise_level["loss_t1"] is None
        slow = [(world.size - 1, 1.0, 0.1)]
        assert [(r, round(s, 6), round(m, 6)) for r, s, m in found.slow_ranks] == (slow if world.is_main else [])

        def work() -> dict[str, object]:
            (folder / f"called_by_{world.rank}").touch()
            return {"large": np.arange(10**6), "words": ["a", "b"], "empty": np.empty((0, 3))}

        shared = once_a_node(world, work)
        assert np.array_equal(shared["large"], np.arange(10**6))  # type: ignore[arg-type]
        assert shared["large"].flags.writeable == world.is_main  # type: ignore[attr-defined]
        assert shared["words"] == ["a", "b"]
        assert shared["empty"].shape == (0, 3)  # type: ignore[attr-defined]

        def refuse() -> None:
            raise UserError(f"rank {world.rank} refuses")

        with pytest.raises(UserError, match="rank 0 refuses"):
            once_a_node(world, refuse)

        tempfile.tempdir = f"/proc/{os.getpid()}"  # Nothing can be written in this folder.
        (folder / f"called_by_{world.rank}").unlink(missing_ok=True)
        assert once_a_node(world, work)["words"] == ["a", "b"]
        assert (folder / f"called_by_{world.rank}").exists()


leave_after(main)
