"""What a member tells the router about a transition."""

from __future__ import annotations

from dataclasses import dataclass

from kunserve_sglang.core.messages import (
    Abort,
    Commit,
    Done,
    Prepare,
    ToInstance,
    TransitionStats,
    Vote,
)
from kunserve_sglang.instance.agent.parts import InstanceParts
from kunserve_sglang.instance.transitions.machine import Machine, PendingAnswer


@dataclass(frozen=True, slots=True)
class Occasion:
    """What an action may have to know of the event that asks for it."""

    message: ToInstance | None
    reason: str
    answer: PendingAnswer | None


class Answers:
    """Every vote and every answer of one member leaves through here."""

    def __init__(self, body: InstanceParts, machine: Machine, *, commit_timeout_s: float) -> None:
        """`commit_timeout_s`: how long to wait for a decision that a peer's data has overtaken."""
        self._body = body
        self._machine = machine
        self._commit_timeout = commit_timeout_s
        self._clock = body.clock

    def vote_yes(self, occasion: Occasion) -> None:
        self._vote(occasion.message)

    def vote_no(self, occasion: Occasion) -> None:
        self._vote(occasion.message, occasion.reason)

    def acknowledge(self, occasion: Occasion) -> None:
        """Say that a decision has been obeyed."""
        if isinstance(occasion.message, Commit | Abort):
            self._reply(occasion.message)

    def refuse(self, occasion: Occasion) -> None:
        """Say that there is nothing here that this decision is about."""
        if isinstance(occasion.message, Commit | Abort):
            self._reply(occasion.message, "not prepared for this epoch")

    def await_commit(self, occasion: Occasion) -> None:
        """The router's decision may come late; what else it says meanwhile, it will say again."""
        answer = occasion.answer
        deadline = self._clock() + self._commit_timeout
        while answer is not None and answer.commit is None and self._clock() < deadline:
            command = self._body.control.receive(0.05)
            if isinstance(command, Commit) and command.epoch == self._machine.layout.epoch:
                answer.commit = command

    def answer(self, occasion: Occasion) -> None:
        """Say that a transition is complete, unless something is still on its way."""
        answer = occasion.answer
        if answer is not None and answer.commit and answer is not self._machine.pending:
            self._reply(answer.commit, stats=answer.stats)

    def refuse_pending(self, occasion: Occasion) -> None:
        """Say that a transition will not be completed, if one was to be."""
        if occasion.answer is not None and occasion.answer.commit:
            self._reply(occasion.answer.commit, occasion.reason)

    def _vote(self, message: ToInstance | None, reason: str = "") -> None:
        if isinstance(message, Prepare):
            epoch = message.transition.epoch
            vote = Vote(call=message.call, epoch=epoch, ok=not reason, reason=reason)
            self._body.control.send(vote)

    def _reply(
        self, command: Commit | Abort, error: str = "", stats: TransitionStats | None = None
    ) -> None:
        self._body.control.send(
            Done(
                call=command.call,
                epoch=command.epoch,
                ok=not error,
                error=error,
                stats=stats or TransitionStats(),
            )
        )
