"""Photographs to pack, shared by several files."""

from pathlib import Path

import pytest

from tests.preparation.packing_jobs import packed, write_tree


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("input") / "photos", dirty=True)


@pytest.fixture(scope="module")
def clean(tree: Path) -> Path:
    """The output of one undisturbed command for `tree`."""
    output = tree.parent / "clean"
    packed(tree, output)
    return output
