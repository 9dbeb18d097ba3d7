"""Fixtures of several files: a server of shards, ways to start a process, photographs to pack."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from multiprocessing.context import ForkContext
from pathlib import Path

import pytest

from jitscale.data import remote
from tests.data.caching import Context
from tests.data.packing_jobs import packed, write_tree
from tests.support.servers import Storage


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    storage = Storage()
    yield storage
    storage.release.set()
    storage.server.shutdown()
    storage.server.server_close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts of this process follow each other at once."""
    monkeypatch.setattr(remote, "_FIRST_WAIT", 0.001)


@pytest.fixture(params=["fork", "spawn"])
def context(request: pytest.FixtureRequest) -> Context:
    return multiprocessing.get_context(request.param)


@pytest.fixture
def fork() -> ForkContext:
    return multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("input") / "photos", dirty=True)


@pytest.fixture(scope="module")
def clean(tree: Path) -> Path:
    """What one command that nothing disturbed makes of `tree`."""
    output = tree.parent / "clean"
    packed(tree, output)
    return output
