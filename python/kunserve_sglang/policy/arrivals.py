"""How fast requests have come lately."""

from __future__ import annotations

import math

from kunserve_sglang.policy.state import ClusterState

_WINDOW_S = 5.0


class Arrivals:
    """Counts what instances say that they have got; earlier requests count less and less.

    An instance that restarts counts from zero again.
    """

    def __init__(self) -> None:
        self._seen: dict[int, int] = {}
        self._began: float | None = None
        self._last = 0.0
        self._weight = 0.0

    def observe(self, now: float, state: ClusterState) -> None:
        """A snapshot of time `now`, in seconds of any one origin."""
        seen = {s.instance: s.load.arrived for s in state.instances}
        came = sum(max(0, n - self._seen.get(i, n)) for i, n in seen.items())
        if self._began is None:
            self._began = now
        else:
            self._weight = self._weight * math.exp((self._last - now) / _WINDOW_S) + came
        self._seen, self._last = seen, now

    @property
    def per_second(self) -> float:
        """As of the last look, at all instances together; an average over what time there was."""
        lasted = self._last - self._began if self._began is not None else 0.0
        seconds = -_WINDOW_S * math.expm1(-lasted / _WINDOW_S)
        # In the first moments a single request would pass for a flood.
        return self._weight / max(1.0, seconds)
