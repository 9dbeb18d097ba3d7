"""Which cases of a test `make test` leaves to `make test-slow`."""

import pytest


def slow_unless(usual: bool, *values: object) -> object:
    """A case of `pytest.mark.parametrize`, marked slow unless it is a usual one."""
    return pytest.param(*values, marks=() if usual else pytest.mark.slow)
