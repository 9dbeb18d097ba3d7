"""Ranks that share the sampling use the same kernel; otherwise no rank samples."""

import json

import pytest

from tests.support.processes import PROGRAMS, run_ranks


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("reference", "how the network samples is not the same on all ranks (rank 0: attention=sdpa torch "),
        ("flash-attn", "engine.attention=flash-attn does not work here ("),
    ],
)
def test_every_rank_refuses_to_sample_with_another_kernel(other: str, message: str) -> None:
    """This includes the case that only one rank lacks the kernel. No rank waits for it."""
    said = run_ranks(2, str(PROGRAMS / "differing_kernels.py"), "sdpa", other, timeout=120)
    first, second = json.loads(said.splitlines()[-1])
    assert first == second
    assert len(first) == 2, "one line from sampling alone, one from a measurement in training"
    assert all(text.startswith(message) for text in first)
