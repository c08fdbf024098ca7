"""When to drop and when to restore (paper sections 3.1 and 4.4). Time comes in as a number."""

from __future__ import annotations

import msgspec

from kunserve_sglang.layout import Layout
from kunserve_sglang.policy.state import ClusterState, InstanceState


class Thresholds(msgspec.Struct, frozen=True, kw_only=True):
    """Fractions of KV capacity, and how long (seconds) a condition must hold."""

    drop: float = 0.95
    restore: float = 0.5
    drop_hold_s: float = 0.2
    restore_hold_s: float = 3.0
    cooldown_s: float = 5.0


class DropNeeded(msgspec.Struct, frozen=True, kw_only=True):
    """Demand exceeds capacity by `tokens` slots."""

    tokens: int
    reason: str


class RestorePossible(msgspec.Struct, frozen=True, kw_only=True):
    """The groups of `instances` would fit their full-replica capacity with room to spare."""

    instances: tuple[int, ...]
    reason: str


class OverloadMonitor:
    """Looks at one snapshot after the other and says when something should be done.

    A condition must hold for a while before it counts, and after a transition nothing is restored
    for the cool-down time, so that noise does not make the cluster swing.
    """

    def __init__(self, thresholds: Thresholds) -> None:
        self.thresholds = thresholds
        self._overloaded_since: float | None = None
        self._idle_since: dict[tuple[int, ...], float] = {}
        self._last_transition = float("-inf")

    def transition_ended(self, now: float) -> None:
        """Start the cool-down; conditions are looked at afresh."""
        self._last_transition = now
        self._overloaded_since = None
        self._idle_since.clear()

    def observe(self, now: float, state: ClusterState) -> DropNeeded | RestorePossible | None:
        """What the cluster needs at time `now` (seconds, any origin)."""
        return self._overload(now, state) or self._recovery(now, state)

    def _overload(self, now: float, state: ClusterState) -> DropNeeded | None:
        over = [(s, self._excess(s)) for s in state.instances]
        over = [(s, excess) for s, excess in over if excess > 0 and s.load.waiting > 0]
        if not over:
            self._overloaded_since = None
            return None
        if self._overloaded_since is None:
            self._overloaded_since = now
        if now - self._overloaded_since < self.thresholds.drop_hold_s:
            return None
        tokens = sum(excess for _, excess in over)
        waiting = sum(s.load.waiting for s, _ in over)
        return DropNeeded(
            tokens=tokens,
            reason=f"{waiting} requests wait; demand exceeds capacity by {tokens} slots "
            f"on instances {[s.instance for s, _ in over]}",
        )

    def _excess(self, state: InstanceState) -> int:
        return state.load.demand - int(self.thresholds.drop * state.load.slots.capacity)

    def _recovery(self, now: float, state: ClusterState) -> RestorePossible | None:
        ready: list[Layout] = []
        for group in state.groups():
            if not group.cooperative or not self._fits(state, group):
                self._idle_since.pop(group.ids, None)
                continue
            since = self._idle_since.setdefault(group.ids, now)
            if now - since >= self.thresholds.restore_hold_s:
                ready.append(group)
        if not ready or now - self._last_transition < self.thresholds.cooldown_s:
            return None
        instances = tuple(sorted(i for group in ready for i in group.ids))
        return RestorePossible(
            instances=instances,
            reason=f"demand on instances {list(instances)} is below "
            f"{self.thresholds.restore:.0%} of full-replica capacity",
        )

    def _fits(self, state: ClusterState, group: Layout) -> bool:
        for number in group.ids:
            member = state.instance(number)
            if member.load.demand >= self.thresholds.restore * member.full_capacity:
                return False
        return True
