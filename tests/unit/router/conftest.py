"""What several tests of the router need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.background import Background
from tests.support.mock_worker import Canned, MockWorker


@pytest.fixture
def plain() -> Iterator[MockWorker]:
    """An HTTP server that no KunServe instance stands behind."""
    background = Background()
    worker = MockWorker(background)
    worker.answers["/server_info"] = Canned({"max_total_num_tokens": 700, "tp_size": 1})
    yield worker
    worker.stop()
    background.stop()
