"""What several tests of the router need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.background import Background
from tests.support.mock_worker import Canned, MockWorker
from tests.support.router_harness import RouterCluster
from tests.support.tenants import FILE


@pytest.fixture
def plain() -> Iterator[MockWorker]:
    """An HTTP server that no KunServe instance stands behind."""
    background = Background()
    worker = MockWorker(background)
    worker.answers["/server_info"] = Canned({"max_total_num_tokens": 700, "tp_size": 1})
    yield worker
    worker.stop()
    background.stop()


@pytest.fixture
def tenants_file(tmp_path: Path) -> Path:
    return tmp_path / "tenants.toml"


@pytest.fixture
def start_tenants(
    start_router: Callable[..., RouterCluster], tenants_file: Path
) -> Callable[..., RouterCluster]:
    """A router with the tenants `a` and `b`, and further lines about each."""

    def started(count: int, a: str = "", b: str = "", **config: Any) -> RouterCluster:
        tenants_file.write_text(FILE.format(a=a, b=b))
        return start_router(count, tenants=str(tenants_file), **config)

    return started
