"""The state machine of a member: follows `table.py`, and keeps what there is to remember.

The participant (`participant.py`) tells it what has happened, and carries out the actions.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from kunserve_sglang.core.errors import InternalError
from kunserve_sglang.core.layout import Layout, layout_of
from kunserve_sglang.core.messages import (
    Abort,
    Commit,
    Lost,
    Mode,
    Prepare,
    ToInstance,
    Transition,
    TransitionKind,
    TransitionStats,
)
from kunserve_sglang.instance.transitions.table import TABLE, Action, MemberEvent, MemberState

_MAX_REJECTED = 64
"""Epochs to remember; a message that is older than so many transitions has been lost."""


_GIVES_UP = (MemberEvent.UNDECIDED, MemberEvent.TIMED_OUT, MemberEvent.PEER_LOST)


@dataclass(slots=True)
class PendingAnswer:
    """What the router is told at the end; no `commit` yet if a peer's data has overtaken it."""

    epoch: int
    commit: Commit | None
    stats: TransitionStats


class Reaction(NamedTuple):
    """`answer`: what was pending until now; actions that answer or refuse speak of it."""

    actions: tuple[Action, ...]
    answer: PendingAnswer | None


class Machine:
    """A member's state, its layout, and what it has to remember of what is under way."""

    def __init__(self, layout: Layout, *, instance: int) -> None:
        self.state = MemberState.INDEPENDENT
        self.layout = layout
        self.under_way: Transition | None = None
        """Voted for, or being carried out."""
        self.growth: Transition | None = None
        """Larger capacities that are mapped and wait for the decision to use them."""
        self.fetching: tuple[Layout, ...] = ()
        """Layouts for which parameters and KV are fetched ahead."""
        self.pending: PendingAnswer | None = None
        self.rejected: deque[int] = deque(maxlen=_MAX_REJECTED)
        """Epochs that have been aborted, or for whose decision this member waits no longer: what
        is said to prepare one of them comes late."""
        self._following = False
        self._me = instance

    @property
    def mode(self) -> Mode:
        """What others are told of the state."""
        if self.state is MemberState.RECOVERING:
            return Mode.RECOVERING
        if self.under_way is not None:
            restoring = self.under_way.kind is TransitionKind.RESTORE
            return Mode.RESTORING if restoring else Mode.PREPARING
        if self.state is MemberState.FETCHING:
            return Mode.RESTORING
        return Mode.COOPERATIVE if self.layout.cooperative else Mode.INDEPENDENT

    def meaning_of(self, message: Commit | Abort | Lost) -> MemberEvent:
        """Whether a command is about what this member is in, and which part of it."""
        if isinstance(message, Lost):
            involved = self.layout.cooperative or self.state is MemberState.RECOVERING
            known = involved and message.broken == self.layout.epoch
            return MemberEvent.LOST if known else MemberEvent.UNKNOWN_LOSS
        commit = isinstance(message, Commit)
        if commit and message.epoch == self.layout.epoch:
            recovering = self.state is MemberState.RECOVERING
            return MemberEvent.UNKNOWN_COMMIT if recovering else MemberEvent.COMMITTED_AGAIN
        if self.under_way is not None:
            if self.under_way.epoch == message.epoch:
                return MemberEvent.COMMITTED if commit else MemberEvent.ABORTED
        elif self.growth is not None and self.growth.epoch == message.epoch:
            return MemberEvent.GROWTH_COMMITTED if commit else MemberEvent.GROWTH_ABORTED
        elif not commit and self.fetching and self.layout.epoch == message.epoch:
            return MemberEvent.FETCH_ABORTED
        return MemberEvent.UNKNOWN_COMMIT if commit else MemberEvent.UNKNOWN_ABORT

    def happen(
        self,
        event: MemberEvent,
        *,
        transition: Transition | None = None,
        answer: PendingAnswer | None = None,
        layout: Layout | None = None,
        epoch: int | None = None,
    ) -> Reaction:
        """Go to the next state; returns what is to be done.

        `transition` is what was prepared or objected to; `answer` comes with whatever ends an
        exchange; `layout` is that after a recovery; `epoch` that of an `Abort`. Raises
        `InternalError`, and changes nothing, if this cannot happen in this state.
        """
        step = TABLE[self.state].get(event)
        if step is None:
            raise InternalError(f"a member that is {self.state} cannot have {event}")
        if answer is not None:
            self.pending = answer
        pending = self.pending
        self._reject(event, epoch, transition)
        if Action.LEAVE_GROUP in step.actions:
            self._forget()
        else:
            self._remember(event, transition, layout)
        stays = step.target is MemberState.AT_REST
        self.state = self._rest() if stays else step.target
        return Reaction(step.actions, pending)

    def overruled_by(self, command: ToInstance) -> bool:
        """Whether the router, which has one transition at a time, goes on without ours."""
        if not isinstance(command, Prepare) or self.under_way is None:
            return False
        return command.transition.epoch > self.under_way.epoch

    def _rest(self) -> MemberState:
        if self.fetching:
            return MemberState.FETCHING
        if self._following:
            return MemberState.FOLLOWING
        return MemberState.COOPERATIVE if self.layout.cooperative else MemberState.INDEPENDENT

    def _reject(self, event: MemberEvent, aborted: int | None, objected: Transition | None) -> None:
        """Remember what will not be, as far as this member knows."""
        if event in _GIVES_UP and self.under_way is not None:
            aborted = self.under_way.epoch
        elif event is MemberEvent.OBJECTED and objected is not None and not only_grows(objected):
            aborted = objected.epoch
        if aborted is not None and aborted not in self.rejected:
            self.rejected.append(aborted)

    def _remember(
        self, event: MemberEvent, transition: Transition | None, layout: Layout | None
    ) -> None:
        match event:
            case MemberEvent.GROWTH_PREPARED:
                self.growth = transition
            case MemberEvent.PREPARED:
                self.under_way, self.growth = transition, None
            case MemberEvent.GROWTH_COMMITTED if self.growth is not None:
                self.layout, self.growth = layout_of(self.growth.after, self._me), None
            case MemberEvent.GROWTH_ABORTED:
                self.growth = None
            case MemberEvent.COMMITTED | MemberEvent.OVERTAKEN:
                self.pending = None  # what was on its way becomes a part of this exchange
            case MemberEvent.ABORTED | MemberEvent.UNDECIDED:
                self.under_way = None
            case MemberEvent.TIMED_OUT:
                self.under_way, self.pending = None, None
            case MemberEvent.EXCHANGED if self.under_way is not None:
                self._exchanged(self.under_way)
            case MemberEvent.ARRIVED:
                self._following, self.pending = False, None
            case MemberEvent.FETCHED_IN_VAIN | MemberEvent.FETCH_ABORTED:
                self.fetching, self.pending = (), None
            case MemberEvent.RECOVERED if layout is not None:
                self.layout = layout

    def _forget(self) -> None:
        self.under_way, self.growth, self.pending = None, None, None
        self.fetching, self._following = (), False

    def _exchanged(self, transition: Transition) -> None:
        self.layout = layout_of(transition.after, self._me)
        self.fetching = transition.ahead
        self._following = transition.live and not transition.ahead
        self.under_way = None
        if not (transition.live or transition.ahead):
            self.pending = None  # nothing is left to wait for


def only_grows(transition: Transition) -> bool:
    """Nobody has to stop for it."""
    return transition.grows and not transition.ahead
