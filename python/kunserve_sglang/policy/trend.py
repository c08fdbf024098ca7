"""Where a noisy figure is going."""

from __future__ import annotations

import math


class Trend:
    """The slope of a figure, with exponentially fading memory of `window_s` seconds.

    A figure that grows steadily is ahead of its own moving average by slope times window; noise
    about a level is ahead of it by nothing, on average. Samples may come at any times.
    """

    def __init__(self, window_s: float) -> None:
        self._window = window_s
        self._last = 0.0
        self._value = 0.0
        self._average: float | None = None

    def add(self, now: float, value: float) -> None:
        """The figure is `value` at `now` (seconds, never before the sample before)."""
        if self._average is None:
            self._average = value
        else:
            fresh = 1 - math.exp(-(now - self._last) / self._window)
            self._average += fresh * (value - self._average)
        self._last, self._value = now, value

    @property
    def slope(self) -> float:
        """Growth per second; 0 until there are two samples."""
        return 0.0 if self._average is None else (self._value - self._average) / self._window

    def peak(self, lead_s: float) -> int:
        """The most that it will be within `lead_s` seconds, if it goes on like this."""
        return round(self._value + max(0.0, self.slope) * lead_s)
