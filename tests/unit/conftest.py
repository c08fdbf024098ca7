"""Fixtures of the unit tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.mock_worker import MockWorker
    from tests.router_harness import RouterCluster


@pytest.fixture
def start_router(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., RouterCluster]]:
    """Starts routers with mock instances, and ends them after the test."""
    # Most of the time of a test would pass until its instances are found to be there.
    monkeypatch.setattr("kunserve_sglang.router.health._TICK_S", 0.02)
    from tests.router_harness import RouterCluster

    started: list[RouterCluster] = []

    def start(*args: Any, **kwargs: Any) -> RouterCluster:
        started.append(RouterCluster(*args, **kwargs))
        return started[-1]

    yield start
    for router in started:
        router.close()


@pytest.fixture
def router(start_router: Callable[..., RouterCluster]) -> RouterCluster:
    """Two instances, both available, and a monitor that does nothing by itself."""
    return start_router(2)


@pytest.fixture(scope="module")
def idle_router() -> Iterator[RouterCluster]:
    """The same for all tests of a module; for calls that must not change anything."""
    from tests.router_harness import RouterCluster

    router = RouterCluster(2)
    yield router
    router.close()


@pytest.fixture
def worker() -> Iterator[MockWorker]:
    """Some HTTP server, and no router."""
    from tests.mock_worker import Background, MockWorker

    background = Background()
    worker = MockWorker(background)
    yield worker
    worker.stop()
    background.stop()
