"""The run that was submitted first. Meanwhile it has passed several time limits."""

import time
from typing import Any

import pytest

from tests.slurm.conftest import Runs, check

pytestmark = pytest.mark.cluster


def test_a_run_through_several_time_limits(
    runs: Runs, time_limited: tuple[str, float], unbroken: list[dict[str, Any]]
) -> None:
    """The limits are real: two minutes, with the signal 20 seconds before."""
    job, begun = time_limited
    check(runs, "limited", job, unbroken, seconds=480)
    print(f"time limits: complete {time.monotonic() - begun:.0f} s after it was submitted")
    assert int(runs.cluster.job(job)["Restarts"]) >= 2
    assert runs.log("limited").count("asked to stop; the state is saved") >= 2
