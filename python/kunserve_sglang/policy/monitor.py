"""When to drop and when to restore (paper sections 3.1 and 4.4). Time comes in as a number."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from kunserve_sglang.core.messages import TransitionKind
from kunserve_sglang.policy.restoring import Split, cheapest_first, splits
from kunserve_sglang.policy.shares import skewed
from kunserve_sglang.policy.state import ClusterState, InstanceState
from kunserve_sglang.policy.thresholds import Thresholds
from kunserve_sglang.policy.transition_request import (
    DropRequest,
    RebalanceRequest,
    RestoreRequest,
    TransitionRequest,
)
from kunserve_sglang.policy.trend import Trend

_MAX_NAMED = 16
"""The most instances that a reason names."""

_TREND_S = 2.0
"""The memory of a trend, in seconds: older demand hardly counts any more."""

_SPLIT_AT_ONCE = 1 / 4
"""The part of the groups ready to be split that is split at once; at least one group is."""

_FLAP_FACTOR = 6
_MAX_PATIENCE = 8
"""A drop within `_FLAP_FACTOR` cool-downs of a restore shows that the restore was too early: the
next one waits twice as long as the last did, but not more than `_MAX_PATIENCE` cool-downs."""


class _Outlook:
    """Where the figures of one instance are going."""

    def __init__(self) -> None:
        self.demand = Trend(_TREND_S)
        self.used = Trend(_TREND_S)


class OverloadMonitor:
    """Looks at one snapshot after the other and says when something should be done.

    Overload is demand above capacity while requests wait; or, before anybody waits, used slots that
    will reach the capacity within the lead time, so that the runtime would retract requests.
    """

    def __init__(self, thresholds: Thresholds) -> None:
        self.thresholds = thresholds
        self._outlooks: dict[int, _Outlook] = {}
        self._overloaded_since: float | None = None
        self._skewed_since: float | None = None
        self._idle_since: dict[tuple[tuple[int, ...], int], float] = {}
        self._last_drop = float("-inf")
        self._last_restore = float("-inf")
        self._patience = 1

    @property
    def cooldown_s(self) -> float:
        """For how long nothing is restored after a drop, as things are."""
        return self._patience * self.thresholds.cooldown_s

    def transition_ended(self, now: float, kind: TransitionKind = TransitionKind.DROP) -> None:
        """Start the cool-down; conditions are looked at afresh."""
        if kind is TransitionKind.DROP:
            tried = self.thresholds.cooldown_s * _FLAP_FACTOR * self._patience
            early = now - self._last_restore < tried
            self._patience = min(2 * self._patience, _MAX_PATIENCE) if early else 1
            self._last_drop = now
        elif kind is TransitionKind.RESTORE:
            self._last_restore = now
        self._overloaded_since = self._skewed_since = None
        self._idle_since.clear()

    def observe(self, now: float, state: ClusterState) -> TransitionRequest | None:
        """What the cluster needs at time `now` (seconds, any origin).

        Slots that a group has already come before slots that cost parameters. Of the groups that
        may be restored, those whose split costs least are named; others may follow them.
        """
        self._outlooks = {
            s.instance: self._outlooks.get(s.instance) or _Outlook() for s in state.instances
        }
        for s in state.instances:
            outlook = self._outlooks[s.instance]
            outlook.demand.add(now, s.load.demand)
            outlook.used.add(now, s.load.slots.used)
        return self._skew(now, state) or self._overload(now, state) or self._recovery(now, state)

    def _skew(self, now: float, state: ClusterState) -> RebalanceRequest | None:
        group = skewed(state, self.thresholds.drop)
        if group is None:
            self._skewed_since = None
            return None
        if self._skewed_since is None:
            self._skewed_since = now
        return group if now - self._skewed_since >= self.thresholds.drop_hold_s else None

    def _overload(self, now: float, state: ClusterState) -> DropRequest | None:
        over = [(s, excess) for s in state.instances if (excess := self._excess(s)) > 0]
        if not over:
            self._overloaded_since = None
            return None
        if self._overloaded_since is None:
            self._overloaded_since = now
        if now - self._overloaded_since < self.thresholds.drop_hold_s:
            return None
        tokens = sum(excess for _, excess in over)
        waiting = sum(s.load.waiting for s, _ in over)
        return DropRequest(
            tokens=tokens,
            weighed=True,
            reason=f"{waiting} requests wait; demand exceeds capacity by {tokens} slots "
            f"on instances {_named(s.instance for s, _ in over)}"
            + ("" if waiting else f" within {self.thresholds.lead_s:g} s"),
        )

    def short(self, state: InstanceState) -> bool:
        """Requests wait there, for slots it does not have."""
        return state.short(self.thresholds.drop)

    def _excess(self, state: InstanceState) -> int:
        """Slots by which demand is going to exceed capacity; 0 if nobody will notice."""
        load, lead_s = state.load, self.thresholds.lead_s
        outlook = self._outlooks[state.instance]
        limit = int(self.thresholds.drop * load.slots.capacity)
        if self.short(state):
            return outlook.demand.peak(lead_s) - limit
        if outlook.used.peak(lead_s) > limit:
            return max(0, outlook.demand.peak(lead_s) - limit)
        return 0

    def _recovery(self, now: float, state: ClusterState) -> RestoreRequest | None:
        ready = list(self._ready(now, state))
        if not ready or now - self._last_drop < self.cooldown_s:
            return None
        cheapest = cheapest_first(state, ready)[: max(1, int(len(ready) * _SPLIT_AT_ONCE))]
        stages = cheapest[0].split.stages
        chosen = [cost.group for cost in cheapest if cost.split.stages == stages]
        instances = tuple(sorted(i for group in chosen for i in group.ids))
        left = "full-replica capacity" if stages == 1 else f"the capacity in groups of {stages}"
        more = f"; of {len(ready)} groups these cost least to split" if len(ready) > 1 else ""
        return RestoreRequest(
            instances=instances,
            stages=stages,
            weighed=True,
            reason=f"demand on instances {_named(instances)} is below "
            f"{self.thresholds.restore:.0%} of {left}{more}",
        )

    def _ready(self, now: float, state: ClusterState) -> Iterator[Split]:
        """Of each group the split into the shortest pipelines that fit for long enough by now."""
        for group in state.groups():
            lasting = [s for s in splits(state, group) if self._lasts(now, state, s)]
            yield from lasting[:1]

    def _lasts(self, now: float, state: ClusterState, wanted: Split) -> bool:
        key = wanted.group.ids, wanted.stages
        if not self._fits(state, wanted):
            self._idle_since.pop(key, None)
            return False
        return now - self._idle_since.setdefault(key, now) >= self.thresholds.restore_hold_s

    def _fits(self, state: ClusterState, wanted: Split) -> bool:
        """Every owner would need less than its share of its part, and find it large enough."""
        for part in wanted.parts:
            for member in part.members:
                demand = self._outlooks[member.instance].demand.peak(self.thresholds.lead_s)
                if demand >= self.thresholds.restore * member.capacity:
                    return False
                if state.instance(member.instance).load.largest > member.capacity:
                    return False
        return True


def _named(instances: Iterable[int]) -> str:
    numbers = list(instances)
    more = f" and {len(numbers) - _MAX_NAMED} more" if len(numbers) > _MAX_NAMED else ""
    return f"{numbers[:_MAX_NAMED]}{more}"
