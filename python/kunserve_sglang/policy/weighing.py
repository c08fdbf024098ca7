"""Is it better to act or to wait? Ways to serve, weighed by what becomes of the requests.

The most requests within their limits win. Where it makes no difference to these, the shorter way
from arrival to end does: dropping has to be worth it, and is not while computing is what is short.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import msgspec

from kunserve_sglang.core.layout import Layout
from kunserve_sglang.policy.decision import Choice
from kunserve_sglang.policy.forecast import Forecast, Serving, forecast
from kunserve_sglang.policy.mean_owner import known_times, most_running, requests_of, serving
from kunserve_sglang.policy.service_level import (
    ServiceLevel,
    Slowness,
    StepTimes,
    limits_by_share,
)
from kunserve_sglang.policy.state import ClusterState

SAME = 0.02
"""Shares of requests within their limits that differ by no more are the same: it is a forecast."""

_MORE = 0.05
"""By so many more requests at once have to run, or more slots are no use."""

_SAME_E2E = 0.05
"""Times from arrival to end that differ by no more are the same."""

_ENOUGH_SOONER = 0.15
"""Acting takes time itself, which no forecast knows of: if no more requests keep their limits by
it, half of them have to end sooner by as much."""

_WORTH = 2.0
"""Limits are what users ask for, but not at any price: for each point of requests that keep theirs
besides, half of all may take so many points longer to their end, and no more."""


class Prospect(msgspec.Struct, frozen=True, kw_only=True):
    """A way to serve some instances, and the forecast for their mean owner."""

    what: str
    stages: int
    slots: int
    forecast: Forecast

    def better_than(self, other: Prospect) -> bool:
        mine, theirs = self.forecast, other.forecast
        if mine.running < theirs.running * (1 + _MORE):
            return False  # whatever it is that helps, it is not memory
        gain = mine.attainment - theirs.attainment
        if gain > SAME:
            return self.worth_its_price(other)
        return gain >= -SAME and mine.e2e_ms < theirs.e2e_ms * (1 - _ENOUGH_SOONER)

    def worth_its_price(self, other: Prospect) -> bool:
        """Whether the way to the end is not too long for what more requests keep their limits."""
        mine, theirs = self.forecast, other.forecast
        gain = mine.attainment - theirs.attainment
        return mine.e2e_ms <= theirs.e2e_ms * (1 + _SAME_E2E + _WORTH * gain)

    def worth_its_bound(self, free: Prospect) -> bool:
        """More requests within their limits than without; in a group, of as many they end sooner.

        Alone, that would be the answer to limits which nobody can keep: one request at a time.
        """
        gain = self.forecast.attainment - free.forecast.attainment
        if abs(gain) > SAME or self.stages == 1:
            return gain > SAME
        return self.forecast.e2e_ms < free.forecast.e2e_ms

    def choice(self, verdict: str, *, chosen: bool) -> Choice:
        told = self.forecast
        return Choice(
            what=self.what,
            stages=self.stages,
            slots=self.slots,
            chosen=chosen,
            verdict=verdict,
            tpot_ms=_finite(told.tpot_ms),
            ttft_ms=_finite(told.ttft_ms),
            e2e_ms=_finite(told.e2e_ms),
            attainment=told.attainment,
            tokens_per_s=told.tokens_per_s,
        )


class Expected(msgspec.Struct, frozen=True, kw_only=True):
    """What users want, how many requests come at all instances together, and how much slower than
    costs predict decode steps have lately been."""

    level: ServiceLevel
    arrivals_per_s: float = 0.0
    slowness: Slowness = Slowness()


class Prospects:
    """What could become of the same instances, while requests come as fast as lately."""

    def __init__(self, state: ClusterState, instances: Iterable[int], expected: Expected) -> None:
        """Raises `ValueError` where costs are not known."""
        self._state = state
        self._owners = [state.instance(i) for i in instances]
        self._measured = known_times(self._owners)
        self._slowness = expected.slowness
        here = expected.arrivals_per_s * len(self._owners) / max(1, len(state.instances))
        layouts = {s.instance: s.layout for s in self._owners}
        self._now = serving(state, self._owners, layouts)
        times, stages = self._times(self._now), self._now.stages
        self.requests = requests_of(self._owners, times, stages, here)
        lengths = self.requests.prompt, self.requests.output
        self.limits = expected.level.limits(self._measured, *lengths)
        self.by_share = limits_by_share(state.wanted, expected.level, self._measured, *lengths)

    def as_it_is(self, what: str) -> Prospect:
        """As now; with a bound if that is better."""
        return self._best(what, self._now)

    def after(self, what: str, layouts: Iterable[Layout]) -> Prospect:
        """With these layouts; with a bound if that is better."""
        by_owner = {i: layout for layout in layouts for i in layout.ids}
        return self._best(what, serving(self._state, self._owners, by_owner))

    def bound(self) -> float:
        """How many requests each owner is to run as things are; infinite: as many as it can."""
        there = self.requests.running + self.requests.waiting
        bounds = self._bounds(self._now, below=there)
        if not bounds:
            return math.inf
        return self._bounded(self._prospect("", self._now), self._now, bounds)[1]

    def _best(self, what: str, way: Serving) -> Prospect:
        free = self._prospect(what, way)
        return self._bounded(free, way, self._bounds(way, below=free.forecast.running))[0]

    def _bounded(
        self, free: Prospect, way: Serving, bounds: Iterable[float]
    ) -> tuple[Prospect, float]:
        """`free`, or the same with that of the bounds which is worth it; and that bound."""
        best, chosen = free, math.inf
        for most in bounds:
            bounded = self._prospect(free.what, msgspec.structs.replace(way, most=most))
            if bounded.worth_its_bound(best) and (best is free or bounded.worth_its_price(best)):
                best, chosen = bounded, most
        return best, chosen

    def _bounds(self, way: Serving, *, below: float) -> list[float]:
        """So many may run for the tokens of some of the requests to keep their limits.

        The loosest first: each that is tighter has to be worth it.
        """
        times = self._times(way)
        found = {
            most_running(self._owners, self.requests, times, way.stages, limits.tpot_ms)
            for _, limits in self.by_share
        }
        return sorted((most for most in found if most < below), reverse=True)

    def _times(self, way: Serving) -> StepTimes:
        return self._measured.slower(self._slowness.of(way.stages, across=way.across))

    def _prospect(self, what: str, way: Serving) -> Prospect:
        gained = len(self._owners) * (way.capacity - self._now.capacity)
        return Prospect(
            what=what,
            stages=way.stages,
            slots=round(gained),
            forecast=forecast(self.requests, way, self._times(way), self.limits, self.by_share),
        )


def in_words(now: Prospect, then: Prospect) -> str:
    """What the way to `then` would change, in a line for people."""
    before, after = now.forecast, then.forecast
    more = after.tokens_per_s / before.tokens_per_s - 1 if before.tokens_per_s else 0.0
    return (
        f"{before.running:.0f} to {after.running:.0f} requests at once on an instance would take "
        f"a token from {before.tpot_ms:.0f} to {after.tpot_ms:.0f} ms, bring "
        f"{abs(more):.0%} {'more' if more >= 0 else 'fewer'} tokens a second, and keep "
        f"{after.attainment:.0%} instead of {before.attainment:.0%} within their limits"
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
