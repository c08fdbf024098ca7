"""The instance's own head: its mode, its part in transitions, its status.

The runtime calls `poll` at every step boundary; everything that changes the instance happens
inside that call. See `docs/structures.md` for the life of a drop.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from kunserve_sglang.errors import InternalError, TransitionTimeout
from kunserve_sglang.instance import wire
from kunserve_sglang.instance.control import ControlLink
from kunserve_sglang.instance.engine import Engine
from kunserve_sglang.instance.exchange import Exchange
from kunserve_sglang.instance.kv_store import KvStore
from kunserve_sglang.instance.parameters import ParameterStore
from kunserve_sglang.instance.pipeline import Pipeline, PipelineCounters
from kunserve_sglang.instance.trace import Tracer
from kunserve_sglang.layout import LayerRange, Layout, Member, MemoryProfile
from kunserve_sglang.memory import PhysicalPagePool
from kunserve_sglang.messages import (
    Abort,
    Commit,
    Done,
    Mode,
    Pages,
    Prepare,
    Span,
    Status,
    ToInstance,
    Trace,
    Traced,
    Transition,
    TransitionKind,
    TransitionStats,
    Vote,
)
from kunserve_sglang.policy.cost_model import CostEstimate
from kunserve_sglang.transport import DataPlane, Packet

_STATUS_INTERVAL_S = 0.05

BUSY = ("own layers", "peer's layers", "finish", "schedule")
"""Spans in which a member of a group does something useful."""


@dataclass(frozen=True, slots=True)
class Body:
    """What an agent is the head of."""

    instance: int
    profile: MemoryProfile
    pool: PhysicalPagePool
    parameters: ParameterStore
    kv: KvStore
    engine: Engine
    plane: DataPlane
    control: ControlLink
    costs: CostEstimate


class Agent:
    """State machine of one instance (DESIGN: modes of an instance)."""

    def __init__(self, body: Body, *, peer_timeout_s: float) -> None:
        self._body = body
        self._me = body.instance
        self._timeout = peer_timeout_s
        self.mode = Mode.INDEPENDENT
        self.layout = self._alone(epoch=0)
        self._pipeline: Pipeline | None = None
        self._counters = PipelineCounters()
        self.tracer = Tracer()
        self._deferred: deque[Packet] = deque()
        self._stale_packets = 0
        self._next_status = 0.0
        self._last_status: Status | None = None
        self.check_pages()

    @property
    def control_handle(self) -> Any:
        """For a `zmq.Poller`: readable when a command waits."""
        return self._body.control.poll_handle

    @property
    def data_handles(self) -> list[Any]:
        """For a `zmq.Poller`: one is readable when a peer's packet waits."""
        return self._body.plane.poll_handles()

    # -- called by the runtime -------------------------------------------------------------------

    def poll(self) -> None:
        """Step boundary: obey the router, report. Afterwards the mode may be another one."""
        while (message := self._body.control.receive()) is not None:
            self._obey(message)
        self.publish()

    @property
    def pipeline(self) -> Pipeline:
        """Cooperative mode only; raises `InternalError` in independent mode."""
        if self._pipeline is None:
            raise InternalError("no pipeline in independent mode")
        return self._pipeline

    def serve_one(self, timeout_s: float = 0.0) -> bool:
        """Do what the next packet of a peer asks for; false if none came in time."""
        packet = self._deferred.popleft() if self._deferred else self._body.plane.receive(timeout_s)
        if packet is not None:
            self._serve(packet)
        return packet is not None

    def publish(self, *, force: bool = False) -> None:
        """Send a status record, at most every 50 ms unless forced."""
        if time.monotonic() >= self._next_status or force:
            self._send_status(self.status())

    def before_sleep(self) -> None:
        """Nothing will happen for a while: leave the router with the latest figures."""
        status = self.status()
        if status != self._last_status:
            self._send_status(status)

    def _send_status(self, status: Status) -> None:
        self._next_status = time.monotonic() + _STATUS_INTERVAL_S
        self._last_status = status
        self._body.control.send(status)

    def status(self) -> Status:
        return Status(
            instance=self._me,
            epoch=self.layout.epoch,
            mode=self.mode,
            layout=self.layout,
            pages=self.pages(),
            load=self._body.engine.load(),
            counters={
                "micro_batches_own": self._counters.own,
                "micro_batches_foreign": self._counters.foreign,
                "busy_ms": int(1e3 * sum(s for n, s in self.tracer.seconds.items() if n in BUSY)),
                "bubble_ms": int(1e3 * self._counters.bubble_s),
                "stale_packets": self._stale_packets,
                "malformed_commands": self._body.control.malformed,
            },
        )

    def pages(self) -> Pages:
        body = self._body
        return Pages(
            parameters=body.parameters.pages,
            kv=body.kv.pages,
            free=body.pool.free,
            total=body.pool.total,
        )

    def check_pages(self) -> None:
        """Invariant 3; raises `InternalError`."""
        pages = self.pages()
        if pages.parameters + pages.kv + pages.free != pages.total:
            raise InternalError(f"pages are not conserved: {pages}")

    # -- stage work ------------------------------------------------------------------------------

    def _serve(self, packet: Packet) -> None:
        header = wire.decode(packet.header)
        if self._pipeline is None or header.epoch != self.layout.epoch:
            self._stale_packets += 1
        elif isinstance(header, wire.MicroBatch):
            self._pipeline.serve(packet, header)
        else:
            raise InternalError(f"{type(header).__name__} outside a transition")

    # -- transitions -----------------------------------------------------------------------------

    def _obey(self, message: ToInstance) -> None:
        if isinstance(message, Prepare):
            self._prepare(message)
        elif isinstance(message, Commit):
            self._reply(message, "not prepared for this epoch")
        elif isinstance(message, Abort):
            self._reply(message)
        elif isinstance(message, Trace):
            self._trace(message)

    def _trace(self, message: Trace) -> None:
        spans: list[Span] = []
        lost = 0
        if message.record:
            self.tracer.start()
        else:
            spans, lost = self.tracer.stop()
        self._body.control.send(Traced(call=message.call, spans=tuple(spans), lost=lost))

    def _prepare(self, message: Prepare) -> None:
        transition = message.transition
        epoch = transition.epoch
        self._body.engine.quiesce()
        reason = self._objection(transition)
        vote = Vote(call=message.call, epoch=epoch, ok=not reason, reason=reason)
        if reason:
            self._body.control.send(vote)
            return
        resting = self.mode
        dropping = transition.kind is TransitionKind.DROP
        self.mode = Mode.PREPARING if dropping else Mode.RESTORING
        self._connect(transition)
        self._body.control.send(vote)
        self.publish(force=True)
        decision, packets = self._await_decision(message)
        if decision is None or isinstance(decision, Commit):
            self._execute(transition, decision, packets, resting)
        else:
            self.mode = resting
            if isinstance(decision, Abort):
                self._reply(decision)
        self.publish(force=True)

    def _await_decision(
        self, message: Prepare
    ) -> tuple[Commit | Abort | Prepare | None, list[Packet]]:
        """Stand still, but go on as a stage: members that have not stopped yet need us.

        Returns the decision; None if a member's data shows that the group has committed; the
        `Prepare` itself if nobody decided in time, which counts as an abort.
        """
        deadline = time.monotonic() + message.decision_s
        epoch = message.transition.epoch
        while time.monotonic() < deadline:
            packet = self._body.plane.receive(0.001)
            if packet is not None:
                if wire.decode(packet.header).epoch == epoch:
                    return None, [packet]
                self._serve(packet)
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
        deadline = time.monotonic() + (commit.deadline_s if commit else self._timeout)
        body = self._body
        exchange = Exchange(
            self._me,
            transition,
            engine=body.engine,
            parameters=body.parameters,
            kv=body.kv,
            plane=body.plane,
            defer=self._deferred.append,
        )
        try:
            with self.tracer.span("exchange", epoch=transition.epoch):
                stats = exchange.run(packets, deadline)
        except TransitionTimeout as error:
            self.mode = resting
            if commit:
                self._reply(commit, str(error))
            return
        self._adopt(exchange.after)
        # Before the answer: whoever hears of the end of a transition finds the new state.
        self.publish(force=True)
        if commit is None:
            commit = self._late_commit(transition.epoch)
        if commit:
            self._reply(commit, stats=stats)

    def _late_commit(self, epoch: int) -> Commit | None:
        """The router's decision, which a peer's data has overtaken."""
        deadline = time.monotonic() + self._timeout
        while time.monotonic() < deadline:
            command = self._body.control.receive(0.05)
            if isinstance(command, Commit) and command.epoch == epoch:
                return command
        return None

    def _adopt(self, layout: Layout) -> None:
        """The data is where `layout` says: run by it from the next step on."""
        body = self._body
        self.layout = layout
        body.engine.bind_kv()
        body.engine.set_capacity(layout.member(self._me).capacity)
        if layout.cooperative:
            self._pipeline = Pipeline(
                self._me,
                layout,
                engine=body.engine,
                kv=body.kv,
                plane=body.plane,
                counters=self._counters,
                tracer=self.tracer,
                costs=body.costs,
                peer_timeout_s=self._timeout,
            )
            body.engine.enter_cooperation(list(layout.ids))
            self.mode = Mode.COOPERATIVE
        else:
            self._pipeline = None
            body.engine.leave_cooperation()
            self.mode = Mode.INDEPENDENT
        self.check_pages()

    def _objection(self, transition: Transition) -> str:
        """Why this member cannot take part; empty if it can."""
        before = next((x for x in transition.before if self._me in x.ids), None)
        after = next((x for x in transition.after if self._me in x.ids), None)
        if before is None or after is None:
            return "the plan has no part for this instance"
        profile = self._body.profile
        if transition.epoch <= self.layout.epoch:
            return f"epoch {transition.epoch} is not after {self.layout.epoch}"
        if before != self.layout:
            return f"the plan starts from another layout than epoch {self.layout.epoch}"
        if not after.covers(self._body.engine.layer_count):
            return "the plan does not hold every layer exactly once"
        member = after.member(self._me)
        owners = len(after.members)
        if owners > profile.owners:
            return f"a group of {owners} is larger than {profile.owners}"
        if member.capacity > profile.capacity(member.layers, owners):
            return f"{member.capacity} slots for {owners} owners do not fit the memory budget"
        self._body.engine.evict_cached(member.capacity)
        taken = len(self._body.engine.taken_slots())
        if taken > member.capacity:
            return f"requests hold {taken} slots, {member.capacity} would be left"
        return ""

    def _connect(self, transition: Transition) -> None:
        peers = {
            m.instance: m.address
            for layout in (*transition.before, *transition.after)
            for m in layout.members
            if m.instance != self._me
        }
        self._body.plane.connect(peers)

    def _reply(
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

    def _alone(self, epoch: int) -> Layout:
        body = self._body
        layers = LayerRange(0, body.engine.layer_count)
        member = Member(
            instance=self._me,
            layers=layers,
            capacity=body.profile.capacity(layers, 1),
            address=body.plane.address,
        )
        return Layout(epoch=epoch, members=(member,))
