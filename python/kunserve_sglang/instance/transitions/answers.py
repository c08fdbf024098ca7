"""What a member tells the router about a transition."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from kunserve_sglang.core.messages import (
    Abort,
    Commit,
    Done,
    Lost,
    Prepare,
    TransitionStats,
    Vote,
)
from kunserve_sglang.instance.parts.instance_parts import InstanceParts
from kunserve_sglang.instance.transitions.machine import Machine, PendingAnswer


@dataclass(frozen=True, slots=True)
class Occasion:
    """What an action may have to know of the event that asks for it."""

    message: Prepare | Commit | Abort | Lost | None
    reason: str
    answer: PendingAnswer | None


class Answers:
    """Every vote and every answer of one member leaves through here."""

    def __init__(self, body: InstanceParts, machine: Machine) -> None:
        self._body = body
        self._machine = machine
        self._last: Done | None = None
        """How the last transition has ended, whether the router knows or not."""

    def vote_yes(self, occasion: Occasion) -> None:
        self._vote(occasion.message)

    def vote_no(self, occasion: Occasion) -> None:
        self._vote(occasion.message, occasion.reason)

    def acknowledge(self, occasion: Occasion) -> None:
        """Say that a decision has been obeyed."""
        if isinstance(occasion.message, Commit | Abort):
            self._reply(occasion.message)

    def refuse(self, occasion: Occasion) -> None:
        """There is nothing here that this decision is about, unless it is said again."""
        if isinstance(occasion.message, Commit):
            self._repeat(occasion.message, otherwise="not prepared for this epoch")

    def repeat(self, occasion: Occasion) -> None:
        """This decision has been obeyed: say how it ended, at once or when all has arrived."""
        commit, pending = occasion.message, self._machine.pending
        if not isinstance(commit, Commit):
            return
        if pending is not None and pending.epoch == commit.epoch:
            pending.commit = commit
        else:
            self._repeat(commit)

    def answer(self, occasion: Occasion) -> None:
        """Say that a transition is complete, unless something is still on its way."""
        answer = occasion.answer
        if answer is not None and answer is not self._machine.pending:
            self._conclude(answer)

    def refuse_pending(self, occasion: Occasion) -> None:
        """Say that a transition will not be completed, if one was to be."""
        if occasion.answer is not None:
            self._conclude(occasion.answer, occasion.reason)

    def _conclude(self, answer: PendingAnswer, error: str = "") -> None:
        """A router that has not asked yet, or does not hear the answer, will ask again."""
        stats = TransitionStats() if error else answer.stats
        self._last = Done(call=0, epoch=answer.epoch, ok=not error, error=error, stats=stats)
        if answer.commit is not None:
            self._repeat(answer.commit)

    def _repeat(self, commit: Commit, otherwise: str = "") -> None:
        """What was the end of it; `otherwise` if this is about another epoch than the last."""
        if self._last is not None and self._last.epoch == commit.epoch:
            self._body.control.send(msgspec.structs.replace(self._last, call=commit.call))
        else:
            self._reply(commit, otherwise)

    def _vote(self, message: Prepare | Commit | Abort | Lost | None, reason: str = "") -> None:
        if isinstance(message, Prepare):
            epoch = message.transition.epoch
            vote = Vote(call=message.call, epoch=epoch, ok=not reason, reason=reason)
            self._body.control.send(vote)

    def _reply(self, command: Commit | Abort, error: str = "") -> None:
        done = Done(call=command.call, epoch=command.epoch, ok=not error, error=error)
        self._body.control.send(done)
