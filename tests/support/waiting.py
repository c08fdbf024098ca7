"""Waiting for what happens elsewhere, in bounded time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def until(
    condition: Callable[[], Any],
    timeout_s: float = 20.0,
    *,
    poll_s: float = 0.005,
    about: Callable[[], object] = lambda: "the condition did not come true in time",
) -> None:
    """Returns once `condition` holds; if it does not in time, fails and says what it is `about`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, about()
        time.sleep(poll_s)
