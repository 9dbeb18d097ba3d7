"""Set-up of all tests."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# This comes before the import of torch: sums must not depend on the number of threads.
os.environ["OMP_NUM_THREADS"] = "1"

# Assertions of these helpers show their values, as assertions of tests do.
pytest.register_assert_rewrite("tests.support", "tests.data", "tests.model", "tests.preparation")

RANK = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}

# These files have tests that need a GPU.
NAMES = (
    *("test_attention.py", "test_execution.py", "test_fused.py", "test_fused_network.py", "test_training_graphs.py"),
)
ON_A_GPU = {Path(__file__).parent / "model" / name for name in NAMES}


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs, unless the command names only files with tests that need one."""
    named = {Path(argument.partition("::")[0]).resolve() for argument in config.args}
    if not named or not named <= ON_A_GPU:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def _no_rank_is_left_over() -> Iterator[None]:
    """A command inside the test process makes the process a rank. Later tests start processes that need other ports."""
    yield
    for name, value in RANK.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
