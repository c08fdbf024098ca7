"""Which of several requests is it? Those that failed together are tried apart, and halved; pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")

STEPS_ON_TRIAL = 3
"""A failure that does not come back within this number of steps is not expected to."""


class Suspects(Generic[T]):
    """Groups of which each is tried by itself, while nobody else begins to run.

    A group is cleared after some steps without a failure. One that fails again is halved; a single
    one that fails again is guilty.
    """

    def __init__(self) -> None:
        self._groups: deque[list[T]] = deque()
        self._steps = 0

    def __bool__(self) -> bool:
        return bool(self._groups)

    def may_run(self, member: T) -> bool:
        """Everybody may if nobody is suspected; else the group that is tried."""
        return not self._groups or member in self._groups[0]

    def failed(self, together: Sequence[T]) -> T | None:
        """These were in a step that failed. The one whose fault it is, if that is certain now."""
        self._steps = 0
        tried = self._groups[0] if self._groups else []
        again = [member for member in together if member in tried]
        if not again:
            if together:
                self._groups.append(list(together))
            return None
        self._groups.popleft()
        half = len(again) // 2
        others = [member for member in tried if member not in again]
        parts = (again[:half], again[half:], others) if half else (others,)
        self._groups.extendleft(part for part in reversed(parts) if part)
        return None if half else again[0]

    def passed(self, together: Collection[T]) -> bool:
        """These have made a step; whether the group that is tried is cleared with it."""
        if not self._groups or not any(member in self._groups[0] for member in together):
            return False
        self._steps += 1
        if self._steps < STEPS_ON_TRIAL:
            return False
        self.clear()
        return True

    def clear(self) -> None:
        """Let the group that is tried run with all others."""
        self._groups.popleft()
        self._steps = 0

    def keep(self, there: Callable[[T], bool]) -> None:
        """Forget those that have ended, or have been aborted: nobody waits for them."""
        tried = self._groups[0] if self._groups else None
        groups = [[member for member in group if there(member)] for group in self._groups]
        if tried is not None and not groups[0]:
            self._steps = 0
        self._groups = deque(group for group in groups if group)
