"""Marks the cases of a test that only `make test-slow` runs."""

import pytest


def slow_unless(usual: bool, *values: object) -> object:
    """A case of `pytest.mark.parametrize`. It is slow unless `usual` is true."""
    return pytest.param(*values, marks=() if usual else pytest.mark.slow)
