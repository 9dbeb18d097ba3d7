"""Photographs to pack."""

from pathlib import Path

import pytest

from tests.preparation.packing_jobs import packed, write_tree


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("input") / "photos", dirty=True)


@pytest.fixture(scope="module")
def clean(tree: Path) -> Path:
    """What one command that nothing disturbed makes of `tree`."""
    output = tree.parent / "clean"
    packed(tree, output)
    return output
