"""Is it better to act or to wait? Ways to serve, weighed by what becomes of the requests.

The most requests within their limits win. Where it makes no difference to these, the shorter way
from arrival to end does: dropping has to be worth it, and is not while computing is what is short.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import msgspec

from kunserve_sglang.core.cost_model import CostModel
from kunserve_sglang.core.layout import Layout
from kunserve_sglang.core.load import Slots
from kunserve_sglang.policy.decision import Choice
from kunserve_sglang.policy.forecast import (
    Forecast,
    PipelineTimes,
    Requests,
    Serving,
    forecast,
)
from kunserve_sglang.policy.service_level import (
    LatencyLimits,
    ServiceLevel,
    Slowness,
    StepTimes,
    times_of,
)
from kunserve_sglang.policy.state import ClusterState, InstanceState

SAME = 0.02
"""Shares of requests within their limits that differ by no more are the same: it is a forecast."""

_MORE = 0.05
"""By so many more requests at once have to run, or more slots are no use."""

_AHEAD = 2.0
"""Requests are expected to come as fast as now for so many times as long as one takes alone."""

_MOST_HELD = 1.5
"""Slots kept for a request, in multiples of what it is expected to need. If there seem to be more,
requests wait for something else."""

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
            return mine.e2e_ms <= theirs.e2e_ms * (1 + _SAME_E2E + _WORTH * gain)
        return gain >= -SAME and mine.e2e_ms < theirs.e2e_ms * (1 - _ENOUGH_SOONER)

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
        self._owners = [state.instance(i) for i in instances]
        self._measured = known_times(self._owners)
        self._slowness = expected.slowness
        here = expected.arrivals_per_s * len(self._owners) / max(1, len(state.instances))
        self._now = serving(self._owners, {s.instance: s.layout for s in self._owners})
        stages = self._now.stages
        self.requests = requests_of(self._owners, self._times(stages), stages, here)
        self.limits = expected.level.limits(
            self._measured, self.requests.prompt, self.requests.output
        )

    def as_it_is(self, what: str) -> Prospect:
        """As now; with a bound if that is better."""
        return self._best(what, self._now)

    def after(self, what: str, layouts: Iterable[Layout]) -> Prospect:
        """With these layouts; with a bound if that is better."""
        by_owner = {i: layout for layout in layouts for i in layout.ids}
        return self._best(what, serving(self._owners, by_owner))

    def bound(self) -> float:
        """How many requests each owner is to run as things are; infinite: as many as it can."""
        most = self._most_running(self._now.stages)
        if self.requests.running + self.requests.waiting <= most:
            return math.inf
        bounded = self._bounded("", self._now)
        return most if bounded.worth_its_bound(self._prospect("", self._now)) else math.inf

    def _best(self, what: str, way: Serving) -> Prospect:
        free = self._prospect(what, way)
        if free.forecast.running <= self._most_running(way.stages):
            return free
        bounded = self._bounded(what, way)
        return bounded if bounded.worth_its_bound(free) else free

    def _bounded(self, what: str, way: Serving) -> Prospect:
        most = self._most_running(way.stages)
        return self._prospect(what, msgspec.structs.replace(way, most=most))

    def _times(self, stages: int) -> StepTimes:
        return self._measured.slower(self._slowness.of(stages))

    def _most_running(self, stages: int) -> float:
        return most_running(self._owners, self.requests, self._times(stages), stages, self.limits)

    def _prospect(self, what: str, way: Serving) -> Prospect:
        gained = len(self._owners) * (way.capacity - self._now.capacity)
        return Prospect(
            what=what,
            stages=way.stages,
            slots=round(gained),
            forecast=forecast(self.requests, way, self._times(way.stages), self.limits),
        )


def known_times(owners: Sequence[InstanceState]) -> StepTimes:
    """The mean of the owners; raises `ValueError` if one of them has not measured its costs."""
    costs: list[CostModel] = [s.costs for s in owners if s.costs is not None]
    if not costs or len(costs) < len(owners):
        raise ValueError("not all instances have measured what their steps cost")
    times = times_of(costs, owners[0].layer_count)
    lone = times.alone(1, 1)
    if min(*times.prefill, *times.decode) < 0 or min(lone.ttft_ms, lone.tpot_ms) <= 0:
        raise ValueError("what instances say of their costs cannot be")
    return times


def serving(owners: Sequence[InstanceState], layouts: dict[int, Layout]) -> Serving:
    """How the mean of the owners is served by these layouts."""
    capacity = sum(layouts[s.instance].member(s.instance).capacity for s in owners)
    stages = max(len(layouts[s.instance].members) for s in owners)
    return Serving(capacity=capacity / len(owners), stages=stages)


def requests_of(
    owners: Sequence[InstanceState], times: StepTimes, stages: int, per_second: float
) -> Requests:
    """The mean owner's requests; `per_second` more come at all of these.

    Reports say what all need together, and what there is of it already.
    """
    count = len(owners)
    running = sum(s.load.running for s in owners)
    waiting = sum(s.load.waiting for s in owners)
    used = sum(s.load.slots.used for s in owners)
    prompts = sum(s.load.prompts for s in owners)
    produced = sum(s.load.produced for s in owners)
    to_come = max(running + waiting, sum(s.load.demand for s in owners) - used - prompts)
    everybody = max(1, running + waiting)
    prompt = max(1.0, (used - produced + prompts) / everybody)
    output = max(1.0, (to_come + produced) / everybody)
    left = (to_come - waiting * output) / running if running else output
    lone = times.alone(prompt, prompt + output / 2)
    left = min(output, max(1.0, left))
    pipeline = PipelineTimes(times=times, stages=stages)
    return Requests(
        running=running / count,
        waiting=waiting / count,
        prompt=prompt,
        output=output,
        left=left,
        held=_held(owners, prompt + output),
        per_second=per_second / count,
        ahead_s=_AHEAD * (lone.ttft_ms + output * lone.tpot_ms) / 1e3,
        token_ms=pipeline.step_ms(running / count, used / count),
    )


def _held(owners: Sequence[InstanceState], needed: float) -> float:
    """Slots for each that runs, by what is seen where some wait for slots; 0 where nobody does.

    SGLang keeps some free, by rules of its own and by what clients allow, so that fewer run than
    expected lengths would let.
    """
    full = [s.load for s in owners if s.load.waiting and s.load.running and _full(s.load.slots)]
    running = sum(load.running for load in full)
    if not running:
        return 0.0
    return min(_MOST_HELD * needed, sum(load.slots.capacity for load in full) / running)


def _full(slots: Slots) -> bool:
    """Whether requests may be waiting for slots; with most of them free it is something else."""
    return slots.used > slots.capacity / 2


def most_running(
    owners: Sequence[InstanceState],
    asked: Requests,
    times: StepTimes,
    stages: int,
    limits: LatencyLimits,
) -> float:
    """How many requests an owner may run so that a token keeps its limit.

    In a group never fewer than there would be slots for without it. While an answer comes, as many
    prompts are computed as requests run: they count as well.
    """
    alone = sum(s.full_capacity for s in owners) / len(owners) / (asked.prompt + asked.output)
    least = 1.0 if stages == 1 else max(1.0, alone)
    pipeline = PipelineTimes(times=times, stages=stages)
    context = asked.prompt + asked.output / 2

    def tpot_ms(requests: float) -> float:
        prompts = requests * pipeline.prompts_ms(1, asked.prompt) / asked.output
        return pipeline.step_ms(requests, requests * context) + prompts

    fixed = tpot_ms(0)
    each = tpot_ms(1) - fixed
    return max(least, (limits.tpot_ms - fixed) / each if each > 0 else math.inf)


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
