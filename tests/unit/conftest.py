"""Fixtures of the unit tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.support.mock_worker import MockWorker
    from tests.support.router_harness import RouterCluster


@pytest.fixture
def router(start_router: Callable[..., RouterCluster]) -> RouterCluster:
    """Two instances, both available, and a monitor that does nothing by itself."""
    return start_router(2)


@pytest.fixture
def impatient(start_router: Callable[..., RouterCluster]) -> RouterCluster:
    """The same, for tests of members that do not vote."""
    return start_router(2, vote_timeout_s=0.3)


@pytest.fixture(scope="module")
def idle_router() -> Iterator[RouterCluster]:
    """The same for all tests of a module; for calls that must not change anything."""
    from tests.support.router_harness import RouterCluster

    router = RouterCluster(2)
    yield router
    router.close()


@pytest.fixture
def worker() -> Iterator[MockWorker]:
    """Some HTTP server, and no router."""
    from tests.support.background import Background
    from tests.support.mock_worker import MockWorker

    background = Background()
    worker = MockWorker(background)
    yield worker
    worker.stop()
    background.stop()
