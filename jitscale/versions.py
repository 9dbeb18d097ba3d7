"""Versions of packages, for the records of runs and measurements."""

import importlib.metadata

__version__ = "0.2.0"  # here, so that a checkout without an installation has a version


def version_of(package: str) -> str | None:
    """The version of an installed package, or None if it has no metadata: not installed, or taken from PYTHONPATH."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
