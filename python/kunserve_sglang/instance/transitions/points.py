"""Where faults can happen on purpose while a member follows its state machine."""

from __future__ import annotations

from kunserve_sglang.core import faults
from kunserve_sglang.instance.transitions.table import Action, MemberEvent

_ON = {
    MemberEvent.PREPARED: "transition.prepared",
    MemberEvent.GROWTH_PREPARED: "growth.mapped",
    MemberEvent.COMMITTED: "transition.committed",
    MemberEvent.OVERTAKEN: "transition.committed",
    MemberEvent.ABORTED: "transition.aborted",
    MemberEvent.RECOVERED: "recovery.reloaded",
}
_BEFORE = {
    Action.RELEASE_LEFT: "transition.followed",
    Action.RELOAD: "recovery.begun",
}
_AFTER = {
    Action.VOTE_YES: "transition.voted",
    Action.ADOPT: "transition.adopted",
    Action.USE_GROWTH: "growth.used",
    Action.CANCEL_FETCH: "restore.given_up",
    Action.LEAVE_GROUP: "recovery.left",
}


def on(event: MemberEvent) -> None:
    """The member is in its next state, and has done nothing about it."""
    _reach(_ON.get(event))


def before(action: Action) -> None:
    _reach(_BEFORE.get(action))


def after(action: Action) -> None:
    _reach(_AFTER.get(action))


def _reach(point: str | None) -> None:
    if point is not None:
        faults.at(point)
