"""Names what happens to a member, and carries out what the state machine says (two-phase)."""

from __future__ import annotations

import logging
from collections.abc import Callable

import msgspec

from kunserve_sglang.core.errors import InternalError, PeerLost, TransitionTimeout
from kunserve_sglang.core.layout import Layout, layout_of
from kunserve_sglang.core.messages import (
    Abort,
    Commit,
    Lost,
    Prepare,
    ToInstance,
    Transition,
    TransitionStats,
)
from kunserve_sglang.instance.agent.group_work import GroupWork
from kunserve_sglang.instance.agent.parts import InstanceParts
from kunserve_sglang.instance.pipeline import wire
from kunserve_sglang.instance.transfer.transfer import Transfer
from kunserve_sglang.instance.transitions.answers import Answers, Occasion
from kunserve_sglang.instance.transitions.exchange import Exchange, map_capacities
from kunserve_sglang.instance.transitions.machine import Machine, PendingAnswer, only_grows
from kunserve_sglang.instance.transitions.objections import objection
from kunserve_sglang.instance.transitions.recovery import reload_dropped
from kunserve_sglang.instance.transitions.table import OBJECTIONS, Action, MemberEvent
from kunserve_sglang.transport import Packet

logger = logging.getLogger(__name__)


class Participant:
    """A member's side of one transition after the other; each ends in bounded time."""

    def __init__(
        self,
        body: InstanceParts,
        machine: Machine,
        work: GroupWork,
        *,
        publish: Callable[[], None],
        peer_timeout_s: float,
    ) -> None:
        self._body = body
        self._machine = machine
        self._work = work
        self._timeout = peer_timeout_s
        self._clock = body.clock
        self._first_packets: list[Packet] = []
        self._left: Transfer | None = None
        answers = Answers(body, machine, commit_timeout_s=peer_timeout_s)
        self._carry_out: dict[Action, Callable[[Occasion], None]] = {
            Action.VOTE_YES: answers.vote_yes,
            Action.VOTE_NO: answers.vote_no,
            Action.ACKNOWLEDGE: answers.acknowledge,
            Action.REFUSE: answers.refuse,
            Action.AWAIT_COMMIT: answers.await_commit,
            Action.ANSWER: answers.answer,
            Action.REFUSE_PENDING: answers.refuse_pending,
            Action.MAP_GROWTH: self._map_growth,
            Action.UNMAP_GROWTH: self._unmap_growth,
            Action.USE_GROWTH: self._use_growth,
            Action.EXCHANGE: self._exchange,
            Action.ADOPT: self._adopt,
            Action.RELEASE_LEFT: self._release_left,
            Action.CANCEL_FETCH: self._cancel_fetch,
            Action.LEAVE_GROUP: self._leave_group,
            Action.RELOAD: self._reload,
            Action.PUBLISH: lambda _: publish(),
        }

    # -- what happens ----------------------------------------------------------------------------

    def obey(self, message: Prepare | Commit | Abort | Lost) -> None:
        """Do what the router says, at a step boundary."""
        if isinstance(message, Prepare):
            self._prepare(message)
        else:
            self._happen(self._machine.meaning_of(message), message=message)

    def poll(self) -> None:
        """Step boundary: look whether all that was on its way has arrived."""
        transfer, pending = self._work.transfer, self._machine.pending
        if pending is not None and transfer is not None and transfer.complete:
            pending.stats = msgspec.structs.replace(
                pending.stats, sent_kv_bytes=transfer.sent_kv_bytes
            )
            self._happen(MemberEvent.ARRIVED)

    def leave_group(self, reason: str) -> None:
        """The group has come apart: nothing that is in flight will ever return."""
        self._happen(MemberEvent.PEER_LOST, reason=reason)

    def _prepare(self, message: Prepare) -> None:
        transition, machine = message.transition, self._machine
        if machine.fetching and machine.fetching != transition.after:
            self._happen(MemberEvent.FETCHED_IN_VAIN)
        growing = only_grows(transition)
        if not growing:
            self._body.engine.quiesce()
        reason = OBJECTIONS.get(machine.state) or objection(self._body, machine.layout, transition)
        if not reason and not growing:
            try:
                self._connect(transition)
            except PeerLost as error:
                reason = str(error)
        if reason:
            self._happen(
                MemberEvent.OBJECTED, message=message, reason=reason, transition=transition
            )
        elif growing:
            self._happen(MemberEvent.GROWTH_PREPARED, message=message, transition=transition)
        else:
            self._happen(MemberEvent.PREPARED, message=message, transition=transition)
            self._await_decision(message)

    def _await_decision(self, message: Prepare) -> None:
        """Stand still, but go on as a stage: members that have not stopped yet need us."""
        deadline = self._clock() + message.decision_s
        while self._work.serve_deferred():
            pass
        while self._clock() < deadline:
            packet = self._body.plane.receive(0.001)
            if packet is not None:
                if wire.decode(packet.header).epoch == message.transition.epoch:
                    self._first_packets = [packet]
                    self._happen(MemberEvent.OVERTAKEN)
                    return
                self._work.serve(packet)
            command = self._body.control.receive()
            if command is not None:
                self._happen(self._machine.meaning_of(command), message=command)
                if self._machine.under_way is None:
                    return
        self._happen(MemberEvent.UNDECIDED)

    def _happen(
        self,
        event: MemberEvent,
        *,
        message: ToInstance | None = None,
        reason: str = "",
        transition: Transition | None = None,
        answer: PendingAnswer | None = None,
        layout: Layout | None = None,
    ) -> None:
        if isinstance(message, Abort | Lost):
            reason = message.reason
        reaction = self._machine.happen(event, transition=transition, answer=answer, layout=layout)
        occasion = Occasion(message, reason or "another transition came", reaction.answer)
        for action in reaction.actions:
            self._carry_out[action](occasion)

    # -- changes of the instance -----------------------------------------------------------------

    def _exchange(self, occasion: Occasion) -> None:
        transition = self._machine.under_way
        if transition is None:
            raise InternalError("an exchange without a transition")
        commit = occasion.message if isinstance(occasion.message, Commit) else None
        deadline = self._clock() + (commit.deadline_s if commit else self._timeout)
        packets, self._first_packets = self._first_packets, []
        answer = PendingAnswer(commit, TransitionStats())
        exchange = Exchange(
            self._body,
            transition,
            fetched=self._work.transfer,
            defer=self._work.defer,
            timeout_s=self._timeout,
        )
        try:
            with self._work.tracer.span("exchange", epoch=transition.epoch):
                answer.stats = exchange.run(packets, deadline)
        except TransitionTimeout as error:
            self._happen(MemberEvent.TIMED_OUT, reason=str(error), answer=answer)
        except PeerLost as error:
            self._happen(MemberEvent.PEER_LOST, reason=str(error), answer=answer)
        else:
            self._left = exchange.left
            self._happen(MemberEvent.EXCHANGED, answer=answer)

    def _adopt(self, _: Occasion) -> None:
        """The data is where the layout says: run by it from the next step on."""
        layout, work, engine = self._machine.layout, self._work, self._body.engine
        left, self._left = self._left, None
        engine.bind_kv()
        engine.set_capacity(layout.member(self._body.instance).capacity)
        if layout.cooperative:
            work.begin(layout)
            engine.enter_cooperation(list(layout.ids))
        else:
            work.end()
            engine.leave_cooperation()
        work.transfer = left
        self._body.check_pages()

    def _map_growth(self, _: Occasion) -> None:
        """Map first, everywhere; owners use the new slots when all stages have them.

        Whatever becomes of the decision, what is mapped does no harm.
        """
        if self._machine.growth is not None:
            map_capacities(self._body, layout_of(self._machine.growth.after, self._body.instance))

    def _unmap_growth(self, _: Occasion) -> None:
        map_capacities(self._body, self._machine.layout)

    def _use_growth(self, _: Occasion) -> None:
        """All stages have mapped the larger capacities; the pipeline goes on."""
        body = self._body
        body.engine.set_capacity(self._machine.layout.member(body.instance).capacity)
        body.check_pages()

    def _release_left(self, _: Occasion) -> None:
        transfer, self._work.transfer = self._work.transfer, None
        if transfer is not None:
            transfer.release_left()
        self._body.engine.bind_kv()

    def _cancel_fetch(self, _: Occasion) -> None:
        """Forget what was fetched ahead; the group goes on as it is."""
        transfer, self._work.transfer = self._work.transfer, None
        if transfer is not None:
            transfer.cancel()

    def _leave_group(self, occasion: Occasion) -> None:
        reason, engine = occasion.reason, self._body.engine
        logger.warning("instance %d has lost its group: %s", self._body.instance, reason)
        self._work.drop()
        engine.give_up(f"the instances that ran this request's layers were lost: {reason}")
        engine.enter_cooperation([])  # no forward pass by itself until all layers are back

    def _reload(self, occasion: Occasion) -> None:
        if not isinstance(occasion.message, Lost):
            raise InternalError("a recovery that the router has not asked for")
        reload_dropped(self._body)
        alone = self._body.alone(occasion.message.epoch)
        map_capacities(self._body, alone)
        self._happen(MemberEvent.RECOVERED, layout=alone)

    def _connect(self, transition: Transition) -> None:
        peers = {
            m.instance: m.address
            for layout in (*transition.before, *transition.after)
            for m in layout.members
            if m.instance != self._body.instance
        }
        self._body.plane.connect(peers)
