"""The most that there was lately. Pure: time is a number."""

from __future__ import annotations

_WINDOW_S = 30.0


class RecentPeak:
    """Of a quantity that goes up and down: its peak in this window and the one before."""

    def __init__(self) -> None:
        self._window = 0
        self._now = self._before = 0.0

    @property
    def over_at(self) -> float:
        """When it is 0 again, if nothing more is observed."""
        return (self._window + 2) * _WINDOW_S

    def observe(self, now: float, value: float) -> None:
        self._turn(now)
        self._now = max(self._now, value)

    def value(self, now: float) -> float:
        """At least of the last half minute, at most of the last minute."""
        self._turn(now)
        return max(self._now, self._before)

    def _turn(self, now: float) -> None:
        window = int(now // _WINDOW_S)
        if window != self._window:
            self._before = self._now if window == self._window + 1 else 0.0
            self._now = 0.0
            self._window = window
