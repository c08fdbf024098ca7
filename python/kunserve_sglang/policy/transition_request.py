"""What may be asked of a cluster, by the controller or by hand, and how it ended."""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar

import msgspec

from kunserve_sglang.core.messages import TransitionKind

_BY_HAND = "asked for"


class Outcome(StrEnum):
    """How a transition ended; a declined one was never begun, as no plan was good enough."""

    RUNNING = "running"
    COMMITTED = "committed"
    ABORTED = "aborted"
    FAILED = "failed"
    DECLINED = "declined"


class DropRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Share parameters until there are `tokens` more slots, or between exactly these `instances`.

    With neither, one merge is enough. If it is to be `weighed`, queueing may be better than that.
    """

    kind: ClassVar[TransitionKind] = TransitionKind.DROP

    tokens: int | None = None
    instances: tuple[int, ...] | None = None
    reason: str = _BY_HAND
    weighed: bool = False


class RestoreRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Split the groups of `instances`, or all, into pipelines of at most `stages` stages.

    With one stage, into full replicas. If it is to be `weighed`, later may be better. An `urgent`
    one takes time from requests that run, others only a little.
    """

    kind: ClassVar[TransitionKind] = TransitionKind.RESTORE

    instances: tuple[int, ...] | None = None
    stages: int = 1
    reason: str = _BY_HAND
    weighed: bool = False
    urgent: bool = False


class RebalanceRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Divide the slots of the groups of `instances`, or of all groups, by demand."""

    kind: ClassVar[TransitionKind] = TransitionKind.REBALANCE

    instances: tuple[int, ...] | None = None
    reason: str = _BY_HAND


TransitionRequest = DropRequest | RestoreRequest | RebalanceRequest

REQUEST_TYPES: dict[TransitionKind, type[TransitionRequest]] = {
    TransitionKind.DROP: DropRequest,
    TransitionKind.RESTORE: RestoreRequest,
    TransitionKind.REBALANCE: RebalanceRequest,
}
