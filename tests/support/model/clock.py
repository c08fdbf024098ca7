"""Time that passes only when nothing is left to do: what takes minutes is over in no time."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable
from typing import Any, NoReturn

import greenlet

MAX_SLEEP_S = 3600.0
_TICK_S = 1e-6
"""Above asyncio's resolution: what is due too early by less than that would be so for good."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose `time` jumps to whatever is due next; there is no outside to wait for."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_NoSleep(self))

    def time(self) -> float:
        return self.now


class _NoSleep(selectors.DefaultSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None or timeout > MAX_SLEEP_S:
            raise AssertionError("everybody waits for somebody else, for good")
        if timeout > 0:
            self._loop.now += max(timeout, _TICK_S)
        return []


class Sleeper:
    """A program that may wait in the middle of any call, as a thread may; one runs at a time."""

    def __init__(self, loop: VirtualLoop, program: Callable[[], None]) -> None:
        self._loop = loop
        self._greenlet = greenlet.greenlet(program)
        self._timer: asyncio.TimerHandle | None = None
        self._stopped_until = 0.0
        self.failure: BaseException | None = None
        self._resume_at(0.0)

    @property
    def alive(self) -> bool:
        return not self._greenlet.dead

    def sleep(self, seconds: float) -> None:
        """Called by the program: go on after so long, or when somebody wakes it."""
        self._resume_at(seconds)
        parent = self._greenlet.parent
        assert parent is not None
        parent.switch()

    def wake(self) -> None:
        """There may be something to do."""
        if self._timer is not None:
            self._resume_at(0.0)

    def stop(self, seconds: float) -> None:
        """It does nothing at all for so long, whatever it was about to do."""
        self._stopped_until = max(self._stopped_until, self._loop.time() + seconds)

    @property
    def running(self) -> bool:
        """Whether it is what runs at this moment."""
        return greenlet.getcurrent() is self._greenlet

    def end(self) -> NoReturn:
        """Called by the program: it ends here, whatever it was about to do."""
        raise greenlet.GreenletExit

    @property
    def stopped(self) -> bool:
        return self._stopped_until > self._loop.time()

    def kill(self) -> None:
        """It never does anything again."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if self.alive:
            self._greenlet.throw(greenlet.GreenletExit)

    def _resume_at(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(seconds, self._resume)

    def _resume(self) -> None:
        self._timer = None
        left = self._stopped_until - self._loop.time()
        if left > 0:
            self._resume_at(left)
            return
        self._greenlet.parent = greenlet.getcurrent()
        try:
            self._greenlet.switch()
        except Exception as error:  # noqa: BLE001  # looked at when the run is over
            self.failure = error
