"""Shared set-up for the tests of weights on disk."""

from importlib.util import find_spec

# diffusers has no release for Python 3.10.
collect_ignore = [] if find_spec("diffusers") else ["test_diffusers.py"]
