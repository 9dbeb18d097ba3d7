"""What all tests share."""

import os
from pathlib import Path

import pytest

# Before torch is imported: sums must not depend on how many threads shared them.
os.environ["OMP_NUM_THREADS"] = "1"

# Helpers say what was wrong, as tests do.
pytest.register_assert_rewrite("tests.support", "tests.data", "tests.preparation")

# They have tests that need a GPU, where there is one.
NAMES = ("test_attention.py", "test_execution.py", "test_fused.py", "test_training_graphs.py")
ON_A_GPU = {Path(__file__).parent / "model" / name for name in NAMES}


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs, unless the command names files with tests that need one and nothing else."""
    named = {Path(argument.partition("::")[0]).resolve() for argument in config.args}
    if not named or not named <= ON_A_GPU:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
