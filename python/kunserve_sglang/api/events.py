"""One transition, as the admin API and the event log tell of it."""

from __future__ import annotations

import msgspec

from kunserve_sglang.core.messages import TransitionKind
from kunserve_sglang.policy.decision import Decision
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
