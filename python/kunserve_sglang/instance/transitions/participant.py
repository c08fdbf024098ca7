"""Names what happens to a member, and carries out what the state machine says (two-phase)."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

import msgspec

from kunserve_sglang.core import faults
from kunserve_sglang.core.errors import (
    InternalError,
    MappingRefused,
    OutOfPages,
    PeerLost,
    TransitionTimeout,
)
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
from kunserve_sglang.instance.packets import wire
from kunserve_sglang.instance.parts.instance_parts import InstanceParts
from kunserve_sglang.instance.pipeline.group_work import GroupWork
from kunserve_sglang.instance.transfer.transfer import Transfer
from kunserve_sglang.instance.transitions import points
from kunserve_sglang.instance.transitions.answers import Answers, Occasion
from kunserve_sglang.instance.transitions.exchange import Exchange
from kunserve_sglang.instance.transitions.machine import Machine, PendingAnswer, only_grows
from kunserve_sglang.instance.transitions.mapping import kept_if_refused, map_capacities
from kunserve_sglang.instance.transitions.objections import objection
from kunserve_sglang.instance.transitions.recovery import reload_dropped
from kunserve_sglang.instance.transitions.table import OBJECTIONS, Action, MemberEvent, MemberState
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
        self._join_by = 0.0
        """Until when every peer that has voted can still reach the barrier."""
        self.put_off: deque[ToInstance] = deque()
        """Commands that came while this member waited for one decision, in their order."""
        self._left: Transfer | None = None
        answers = Answers(body, machine)
        self._carry_out: dict[Action, Callable[[Occasion], None]] = {
            Action.VOTE_YES: answers.vote_yes,
            Action.VOTE_NO: answers.vote_no,
            Action.ACKNOWLEDGE: answers.acknowledge,
            Action.REFUSE: answers.refuse,
            Action.REPEAT: answers.repeat,
            Action.ANSWER: answers.answer,
            Action.REFUSE_PENDING: answers.refuse_pending,
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
        if pending is None or transfer is None:
            return
        if not transfer.complete:
            if self._machine.state is MemberState.FOLLOWING:
                transfer.check_progress()
        else:
            if self._machine.fetching:
                faults.at("restore.fetched")
            sent = transfer.sent_kv_bytes
            pending.stats = msgspec.structs.replace(pending.stats, sent_kv_bytes=sent)
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
        reason = OBJECTIONS.get(machine.state) or objection(
            self._body, machine.layout, machine.rejected, transition
        )
        if not reason:
            try:
                if growing:
                    self._map_growth(transition)
                else:
                    self._body.connect(transition, machine.layout.ids)
            except (PeerLost, OutOfPages, MappingRefused) as error:
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
        # A peer may have voted later, but not by more than that.
        self._join_by = deadline + message.decision_s
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
            if command is not None and not self._heed(command):
                return
        self._happen(MemberEvent.UNDECIDED)

    def _heed(self, command: ToInstance) -> bool:
        """Obey, or put off, what comes while a decision is due; false if it is not any more."""
        machine = self._machine
        if isinstance(command, Commit | Abort | Lost):
            self._happen(machine.meaning_of(command), message=command)
        elif isinstance(command, Prepare) and machine.under_way == command.transition:
            self._happen(MemberEvent.PREPARED_AGAIN, message=command)
        else:
            self.put_off.append(command)
        if machine.overruled_by(command):
            self._happen(MemberEvent.UNDECIDED)
        return machine.under_way is not None

    def _happen(
        self,
        event: MemberEvent,
        *,
        message: Prepare | Commit | Abort | Lost | None = None,
        reason: str = "",
        transition: Transition | None = None,
        answer: PendingAnswer | None = None,
        layout: Layout | None = None,
    ) -> None:
        if isinstance(message, Abort | Lost):
            reason = message.reason
        reaction = self._machine.happen(
            event,
            transition=transition,
            answer=answer,
            layout=layout,
            epoch=message.epoch if isinstance(message, Abort) else None,
        )
        occasion = Occasion(message, reason or "another transition came", reaction.answer)
        points.on(event)
        for action in reaction.actions:
            points.before(action)
            self._carry_out[action](occasion)
            points.after(action)

    # -- changes of the instance -----------------------------------------------------------------

    def _exchange(self, occasion: Occasion) -> None:
        transition = self._machine.under_way
        if transition is None:
            raise InternalError("an exchange without a transition")
        commit = occasion.message if isinstance(occasion.message, Commit) else None
        deadline = self._clock() + (commit.deadline_s if commit else self._timeout)
        packets, self._first_packets = self._first_packets, []
        answer = PendingAnswer(transition.epoch, commit, TransitionStats())
        exchange = Exchange(
            self._body,
            transition,
            running=self._work.epoch,
            fetched=self._work.transfer,
            defer=self._work.defer,
            timeout_s=self._timeout,
        )
        try:
            with self._work.tracer.span("exchange", epoch=transition.epoch):
                answer.stats = exchange.run(packets, min(deadline, self._join_by), deadline)
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

    def _map_growth(self, transition: Transition) -> None:
        """Map first, everywhere; owners use the new slots when all stages have them.

        Whatever becomes of the decision, what is mapped does no harm.
        """
        try:
            map_capacities(self._body, layout_of(transition.after, self._body.instance))
        except (OutOfPages, MappingRefused):
            if self._machine.growth is None:
                self._unmap_growth()
            raise

    def _unmap_growth(self, _: Occasion | None = None) -> None:
        with kept_if_refused():
            map_capacities(self._body, self._machine.layout)

    def _use_growth(self, _: Occasion) -> None:
        """All stages have mapped the larger capacities; the pipeline goes on."""
        body = self._body
        body.engine.set_capacity(self._machine.layout.member(body.instance).capacity)
        body.check_pages()

    def _release_left(self, _: Occasion) -> None:
        transfer, self._work.transfer = self._work.transfer, None
        if transfer is not None:
            with kept_if_refused():
                transfer.release_left()
        self._body.engine.bind_kv()

    def _cancel_fetch(self, _: Occasion) -> None:
        """Forget what was fetched ahead; the group goes on as it is."""
        transfer, self._work.transfer = self._work.transfer, None
        if transfer is not None:
            with kept_if_refused():
                transfer.cancel()

    def _leave_group(self, occasion: Occasion) -> None:
        engine = self._body.engine
        logger.warning("instance %d has lost its group: %s", self._body.instance, occasion.reason)
        self._work.drop()
        engine.start_over()
        engine.enter_cooperation([])  # no forward pass by itself until all layers are back

    def _reload(self, occasion: Occasion) -> None:
        if not isinstance(occasion.message, Lost):
            raise InternalError("a recovery that the router has not asked for")
        alone = self._body.alone(occasion.message.epoch)
        try:
            reload_dropped(self._body, alone)
        except (OutOfPages, MappingRefused) as error:
            logger.error("recovery waits to be asked for again: %s", error)
            return
        self._happen(MemberEvent.RECOVERED, layout=alone)
