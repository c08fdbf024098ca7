"""The record of every transition since the router's start."""

from __future__ import annotations

import time
from collections import deque

from kunserve_sglang.api.events import Event
from kunserve_sglang.policy.decision import Decision
from kunserve_sglang.policy.state import ClusterState
from kunserve_sglang.policy.transition_request import Outcome, TransitionRequest


def declined(
    epoch: int, request: TransitionRequest, state: ClusterState, error: str, decision: Decision
) -> Event:
    """The event of a transition that was asked for, and that no plan was good enough for."""
    return Event(
        epoch=epoch,
        kind=request.kind,
        reason=request.reason,
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
