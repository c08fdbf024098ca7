"""The record of every transition, in the words of the admin API."""

from __future__ import annotations

import time
from collections import deque

import msgspec

from kunserve_sglang.core.messages import TransitionKind
from kunserve_sglang.policy.decision import Decision
from kunserve_sglang.policy.state import ClusterState
from kunserve_sglang.policy.transition_request import Outcome


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One transition. Bytes are summed over the members, times are the longest of them.

    `decision` says what was known and which ways were compared.
    """

    epoch: int
    kind: TransitionKind
    reason: str
    instances: list[int]
    status: Outcome
    time: float
    duration_ms: float = 0.0
    stall_ms: float = 0.0
    remap_ms: float = 0.0
    freed_bytes: int = 0
    loaded_bytes: int = 0
    exchanged_bytes: int = 0
    compacted_slots: int = 0
    capacity_before: int = 0
    capacity_after: int = 0
    error: str = ""
    decision: Decision | None = None


def declined(epoch: int, reason: str, state: ClusterState, error: str, decision: Decision) -> Event:
    """The event of a drop that was needed for `reason`, and that no plan was good enough for."""
    return Event(
        epoch=epoch,
        kind=TransitionKind.DROP,
        reason=reason,
        instances=sorted(s.instance for s in state.instances),
        status=Outcome.DECLINED,
        time=time.time(),
        capacity_before=state.capacity,
        capacity_after=state.capacity,
        error=error,
        decision=decision,
    )


class EventLog:
    """The latest events, oldest first."""

    def __init__(self, limit: int = 1000) -> None:
        self._events: deque[Event] = deque(maxlen=limit)

    def add(self, event: Event) -> None:
        self._events.append(event)

    def latest(self, limit: int | None = None) -> list[Event]:
        events = list(self._events)
        return events if limit is None else events[-limit:]
