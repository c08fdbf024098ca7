"""An event loop in which nobody waits: when all sleep, it is the next one's time at once.

What takes time on the way (the work of this process itself) takes none there, so runs are the same
on any machine, however busy.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Mapping
from typing import Any


class _Leap(selectors.BaseSelector):
    """Waits for nothing but the time, which passes at once."""

    def __init__(self) -> None:
        self.now = 0.0
        self._own = selectors.DefaultSelector()

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._own.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._own.unregister(fileobj)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._own.get_map()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Raises `RuntimeError` where everybody would wait for ever."""
        if timeout is None:
            raise RuntimeError("nobody will ever wake up")
        self.now += timeout
        return []

    def close(self) -> None:
        self._own.close()


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """`time()` is what has been slept through."""

    def __init__(self) -> None:
        self._leap = _Leap()
        super().__init__(self._leap)

    def time(self) -> float:
        return self._leap.now
