"""Fixtures that several files share: a server of shards, and ways to start a process."""

import multiprocessing
from collections.abc import Iterator
from multiprocessing.context import ForkContext

import pytest

from jitscale.data import remote
from tests.data.caching import Context
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
    """This process retries without a pause."""
    monkeypatch.setattr(remote, "_FIRST_WAIT", 0.001)


@pytest.fixture(params=["fork", "spawn"])
def context(request: pytest.FixtureRequest) -> Context:
    return multiprocessing.get_context(request.param)


@pytest.fixture
def fork() -> ForkContext:
    return multiprocessing.get_context("fork")
