"""A member's side of a transition: vote, wait for the decision, move the data (two-phase)."""

from __future__ import annotations

from typing import Protocol

import msgspec

from kunserve_sglang.core.errors import PeerLost, TransitionTimeout
from kunserve_sglang.core.layout import Layout
from kunserve_sglang.core.messages import (
    Abort,
    Commit,
    Done,
    Mode,
    Prepare,
    Transition,
    TransitionKind,
    TransitionStats,
    Vote,
)
from kunserve_sglang.instance.agent.body import Body
from kunserve_sglang.instance.agent.trace import Tracer
from kunserve_sglang.instance.pipeline import wire
from kunserve_sglang.instance.transfer.transfer import Transfer
from kunserve_sglang.instance.transitions.exchange import Exchange, layout_of, map_capacities
from kunserve_sglang.instance.transitions.objections import objection
from kunserve_sglang.transport import Packet


class Host(Protocol):
    """What a transition changes of the instance it runs in, and needs it for."""

    mode: Mode
    layout: Layout
    tracer: Tracer
    transfer: Transfer | None

    def adopt(self, layout: Layout) -> None:
        """The data is where `layout` says: run by it from the next step on."""
        ...

    def carry(self, transfer: Transfer | None) -> None:
        """Let pieces move while serving, until further notice."""
        ...

    def grow(self, layout: Layout) -> None:
        """All stages have mapped the larger capacities of `layout`."""
        ...

    def serve(self, packet: Packet) -> None:
        """Stage work for a peer that has not come to rest yet."""
        ...

    def serve_deferred(self) -> bool:
        """Stage work that has waited here; false if there is none."""
        ...

    def defer(self, packet: Packet) -> None:
        """A packet of the new layout came early: serve it once that is adopted."""
        ...

    def publish(self, *, force: bool = False) -> None: ...


class Participant:
    """Runs one transition after the other; each ends in bounded time (invariant 6)."""

    def __init__(self, body: Body, host: Host, *, peer_timeout_s: float) -> None:
        self._body = body
        self._host = host
        self._me = body.instance
        self._timeout = peer_timeout_s
        self._clock = body.clock
        self._growth: Transition | None = None
        self._ahead: tuple[Layout, ...] = ()
        self._owed: tuple[Commit | None, TransitionStats] | None = None

    # -- commands --------------------------------------------------------------------------------

    def prepare(self, message: Prepare) -> None:
        transition = message.transition
        if self._ahead and self._ahead != transition.after:
            self._abandon("another transition came")
        if transition.grows and not transition.ahead:
            self._prepare_growth(message)
        else:
            self._prepare(message)

    def commit(self, message: Commit) -> None:
        """A decision for which nobody stands still."""
        growth, self._growth = self._growth, None
        if growth is None or growth.epoch != message.epoch:
            self.reply(message, "not prepared for this epoch")
            return
        self._host.grow(layout_of(growth.after, self._me))
        self._host.publish(force=True)
        self.reply(message)

    def abort(self, message: Abort) -> None:
        """Take back what was prepared, or stop what is fetched ahead."""
        if self._growth is not None and self._growth.epoch == message.epoch:
            self._growth = None
            map_capacities(self._body, self._host.layout)
        elif self._ahead and message.epoch == self._host.layout.epoch:
            self._abandon(message.reason)
        self.reply(message)

    def poll(self) -> None:
        """Step boundary: answer once all that was on its way has arrived."""
        transfer = self._host.transfer
        if self._owed is None or transfer is None or not transfer.complete:
            return
        commit, stats = self._owed
        self._owed = None
        if not self._ahead:
            transfer.release_left()
            self._host.carry(None)
            self._body.engine.bind_kv()
        self._host.publish(force=True)
        if commit:
            stats = msgspec.structs.replace(stats, sent_kv_bytes=transfer.sent_kv_bytes)
            self.reply(commit, stats=stats)

    # -- capacities only grow: nobody stops ------------------------------------------------------

    def _prepare_growth(self, message: Prepare) -> None:
        """Map first, everywhere; owners use the new slots when all stages have them.

        Whatever becomes of the decision, what is mapped does no harm.
        """
        transition = message.transition
        reason = self._objection(transition)
        if not reason:
            map_capacities(self._body, layout_of(transition.after, self._me))
            self._growth = transition
        self._vote(message, reason)

    # -- everybody stands still ------------------------------------------------------------------

    def _prepare(self, message: Prepare) -> None:
        transition = message.transition
        self._growth = None
        self._body.engine.quiesce()
        reason = self._objection(transition)
        if reason:
            self._vote(message, reason)
            return
        resting = self._host.mode
        restoring = transition.kind is TransitionKind.RESTORE
        self._host.mode = Mode.RESTORING if restoring else Mode.PREPARING
        try:
            self._connect(transition)
        except PeerLost as error:
            self._host.mode = resting
            self._vote(message, str(error))
            return
        self._vote(message)
        self._host.publish(force=True)
        decision, packets = self._await_decision(message)
        if decision is None or isinstance(decision, Commit):
            self._execute(transition, decision, packets, resting)
        else:
            self._host.mode = resting
            if isinstance(decision, Abort):
                self.reply(decision)
        self._host.publish(force=True)

    def _await_decision(
        self, message: Prepare
    ) -> tuple[Commit | Abort | Prepare | None, list[Packet]]:
        """Stand still, but go on as a stage: members that have not stopped yet need us.

        Returns the decision; None if a member's data shows that the group has committed; the
        `Prepare` itself if nobody decided in time, which counts as an abort.
        """
        deadline = self._clock() + message.decision_s
        epoch = message.transition.epoch
        while self._host.serve_deferred():
            pass
        while self._clock() < deadline:
            packet = self._body.plane.receive(0.001)
            if packet is not None:
                header = wire.decode(packet.header)
                if header.epoch == epoch:
                    return None, [packet]
                self._host.serve(packet)
            command = self._body.control.receive()
            if isinstance(command, Commit | Abort) and command.epoch == epoch:
                return command, []
        return message, []

    def _execute(
        self,
        transition: Transition,
        commit: Commit | None,
        packets: list[Packet],
        resting: Mode,
    ) -> None:
        deadline = self._clock() + (commit.deadline_s if commit else self._timeout)
        exchange = Exchange(
            self._body,
            transition,
            fetched=self._host.transfer,
            defer=self._host.defer,
            timeout_s=self._timeout,
        )
        try:
            with self._host.tracer.span("exchange", epoch=transition.epoch):
                stats = exchange.run(packets, deadline)
        except TransitionTimeout as error:
            self._host.mode = resting
            if commit:
                self.reply(commit, str(error))
            return
        except PeerLost as error:
            if commit:
                self.reply(commit, str(error))
            raise
        self._host.adopt(exchange.after)
        self._host.carry(exchange.left)
        self._ahead = transition.ahead
        if self._ahead:
            self._host.mode = Mode.RESTORING
        # Before the answer: whoever hears of the end of a transition finds the new state.
        self._host.publish(force=True)
        if commit is None:
            commit = self._late_commit(transition.epoch)
        if exchange.left is not None:
            self._owed = commit, stats
        elif commit:
            self.reply(commit, stats=stats)

    def give_up(self, reason: str) -> None:
        """The group has come apart: forget what was agreed on, and say so where it is due."""
        self._growth = None
        self._ahead = ()
        self._refuse_owed(reason)

    def _abandon(self, reason: str) -> None:
        """Forget what was fetched ahead; the group goes on as it is."""
        transfer = self._host.transfer
        if transfer is not None:
            transfer.cancel()
        self._host.carry(None)
        self._host.mode = Mode.COOPERATIVE
        self._ahead = ()
        self._refuse_owed(reason)

    def _refuse_owed(self, reason: str) -> None:
        owed, self._owed = self._owed, None
        if owed is not None and owed[0] is not None:
            self.reply(owed[0], reason)

    def _late_commit(self, epoch: int) -> Commit | None:
        """The router's decision, which a peer's data has overtaken."""
        deadline = self._clock() + self._timeout
        while self._clock() < deadline:
            command = self._body.control.receive(0.05)
            if isinstance(command, Commit) and command.epoch == epoch:
                return command
        return None

    def _objection(self, transition: Transition) -> str:
        if self._host.mode is Mode.RECOVERING:
            return "its group has come apart"
        if self._host.transfer is not None and not self._ahead:
            return "an exchange is still under way"
        return objection(self._body, self._host.layout, transition)

    def _vote(self, message: Prepare, reason: str = "") -> None:
        epoch = message.transition.epoch
        vote = Vote(call=message.call, epoch=epoch, ok=not reason, reason=reason)
        self._body.control.send(vote)

    def _connect(self, transition: Transition) -> None:
        peers = {
            m.instance: m.address
            for layout in (*transition.before, *transition.after)
            for m in layout.members
            if m.instance != self._me
        }
        self._body.plane.connect(peers)

    def reply(
        self,
        command: Commit | Abort,
        error: str = "",
        stats: TransitionStats | None = None,
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
