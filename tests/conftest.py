"""What all tests share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch is imported: sums must not depend on how many threads shared them.
os.environ["OMP_NUM_THREADS"] = "1"

# Helpers say what was wrong, as tests do.
pytest.register_assert_rewrite("tests.support", "tests.data", "tests.preparation")

RANK = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}

# They have tests that need a GPU, where there is one.
NAMES = ("test_attention.py", "test_execution.py", "test_fused.py", "test_training_graphs.py")
ON_A_GPU = {Path(__file__).parent / "model" / name for name in NAMES}


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs, unless the command names files with tests that need one and nothing else."""
    named = {Path(argument.partition("::")[0]).resolve() for argument in config.args}
    if not named or not named <= ON_A_GPU:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def _no_rank_is_left_over() -> Iterator[None]:
    """A command that a test runs in its own process becomes a rank there; processes of later tests need other ports."""
    yield
    for name, value in RANK.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
