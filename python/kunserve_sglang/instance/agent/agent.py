"""The instance's own head: its mode, its layout, its pipeline, its status.

The runtime calls `poll` at every step boundary; everything that changes the instance happens
inside that call. See `docs/structures.md` for the life of a drop.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import Any

from kunserve_sglang.core.errors import InternalError, PeerLost
from kunserve_sglang.core.layout import LayerRange, Layout, Member
from kunserve_sglang.core.messages import (
    Abort,
    Attainable,
    Commit,
    Leave,
    Lost,
    Mode,
    Pages,
    Prepare,
    Span,
    Status,
    ToInstance,
    Trace,
    Traced,
    Welcome,
)
from kunserve_sglang.instance.agent.body import Body
from kunserve_sglang.instance.agent.cache_log import CacheLog
from kunserve_sglang.instance.agent.trace import Tracer
from kunserve_sglang.instance.pipeline import wire
from kunserve_sglang.instance.pipeline.pipeline import Pipeline, PipelineCounters
from kunserve_sglang.instance.transfer.transfer import Transfer
from kunserve_sglang.instance.transitions.exchange import map_capacities
from kunserve_sglang.instance.transitions.recovery import reload_dropped
from kunserve_sglang.instance.transitions.transitions import Participant
from kunserve_sglang.transport import Packet

logger = logging.getLogger(__name__)

_STATUS_INTERVAL_S = 0.05

_PIECE_WAIT_S = 0.001
_BACKGROUND_SHARE = 0.1
"""How much of the time goes into what nobody waits for."""

BUSY = ("own layers", "peer's layers", "finish", "schedule")
"""Spans in which a member of a group does something useful."""


class Agent:
    """State machine of one instance; its states are `messages.Mode`."""

    def __init__(self, body: Body, *, peer_timeout_s: float) -> None:
        self._body = body
        self._me = body.instance
        self._speaks = body.rank == 0
        self._timeout = peer_timeout_s
        self.mode = Mode.INDEPENDENT
        self.layout = self._alone(epoch=0)
        self._pipeline: Pipeline | None = None
        self._counters = PipelineCounters()
        self.tracer = Tracer()
        self.transfer: Transfer | None = None
        self._deferred: deque[tuple[Packet, wire.Header]] = deque()
        self._pieces: deque[tuple[Packet, wire.Header]] = deque()
        self._stale_packets = 0
        self._next_status = 0.0
        self._last_status: Status | None = None
        self._cache_log = CacheLog(self._me)
        self._participant = Participant(body, self, peer_timeout_s=peer_timeout_s)
        self.check_pages()

    @property
    def poll_handles(self) -> list[Any]:
        """For a `zmq.Poller`: one is readable when a command or a peer's packet waits."""
        return [*self._body.control.poll_handles, *self._body.plane.poll_handles()]

    # -- called by the runtime -------------------------------------------------------------------

    def poll(self) -> None:
        """Step boundary: obey the router, report. Afterwards the mode may be another one."""
        try:
            while (message := self._body.control.receive()) is not None:
                self._obey(message)
            self._participant.poll()
        except PeerLost as error:
            self.strand(str(error))
        self.publish()

    @property
    def pipeline(self) -> Pipeline:
        """Cooperative mode only; raises `InternalError` in independent mode."""
        if self._pipeline is None:
            raise InternalError("no pipeline in independent mode")
        return self._pipeline

    def serve_one(self, timeout_s: float = 0.0) -> bool:
        """Do what a packet of a peer asks for; false if none came in time.

        Activations go first, whatever arrived before them.
        """
        packet = self._body.plane.receive(0.0 if self._deferred or self._pieces else timeout_s)
        while packet is not None:
            self.defer(packet)
            packet = self._body.plane.receive()
        return self.serve_deferred()

    def serve_deferred(self) -> bool:
        """Do what a packet that is here already asks for; false if there is none."""
        waiting = self._deferred or self._pieces
        if not waiting:
            return False
        self._serve(*waiting.popleft())
        return True

    def move_pieces(self, busy_s: float) -> bool:
        """Send some of what is on its way to peers, after `busy_s` of work; false if none went."""
        if self.transfer is None:
            return False
        return self.transfer.pump(busy_s * (1.0 if self.transfer.urgent else _BACKGROUND_SHARE))

    def publish(self, *, force: bool = False) -> None:
        """Send a status record, at most every 50 ms unless forced; rank 0 does it for all."""
        if self._speaks and (force or time.monotonic() >= self._next_status):
            self._send_status(self.status())

    def before_sleep(self) -> None:
        """Nothing will happen for a while: leave the router with the latest figures."""
        if not self._speaks:
            return
        status = self.status()
        if status != self._last_status or self._cache_log.pending:
            self._send_status(status)

    def _send_status(self, status: Status) -> None:
        self._next_status = time.monotonic() + _STATUS_INTERVAL_S
        self._last_status = status
        self._body.control.send(status)
        if (report := self._cache_log.report()) is not None:
            self._body.control.send(report)

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
        """Check that no page is lost (invariant 3); raises `InternalError`."""
        pages = self.pages()
        if pages.parameters + pages.kv + pages.free != pages.total:
            raise InternalError(f"pages are not conserved: {pages}")

    # -- stage work ------------------------------------------------------------------------------

    def defer(self, packet: Packet) -> None:
        """Keep a packet for later, in the order of its kind."""
        header = wire.decode(packet.header)
        queue = self._deferred if isinstance(header, wire.MicroBatch) else self._pieces
        queue.append((packet, header))

    def serve(self, packet: Packet) -> None:
        self._serve(packet, wire.decode(packet.header))

    def _serve(self, packet: Packet, header: wire.Header) -> None:
        if self._pipeline is None or header.epoch != self._pipeline.epoch:
            self._stale_packets += 1
        elif isinstance(header, wire.MicroBatch):
            self._pipeline.serve(packet, header)
        elif self.transfer is not None:
            self.transfer.store(packet, header)
        else:
            self._stale_packets += 1  # fetched ahead, for a transition that was given up

    def _next_piece(self) -> Packet | None:
        """The next packet of a transfer, for a stage that cannot go on without it."""
        self.check_for_losses()
        if not self._pieces and (packet := self._body.plane.receive(_PIECE_WAIT_S)) is not None:
            self.defer(packet)
        return self._pieces.popleft()[0] if self._pieces else None

    # -- transitions -----------------------------------------------------------------------------

    def _obey(self, message: ToInstance) -> None:
        if isinstance(message, Prepare):
            self._participant.prepare(message)
        elif isinstance(message, Commit):
            self._participant.commit(message)
        elif isinstance(message, Abort):
            self._participant.abort(message)
        elif isinstance(message, Lost):
            self._recover(message)
        elif isinstance(message, Attainable):
            self._body.engine.limit_requests(message.slots)
        elif self._speaks:
            self._obey_alone(message)

    def _obey_alone(self, message: ToInstance) -> None:
        """What one rank does for all, and no other needs to know of."""
        if isinstance(message, Trace):
            self._trace(message)
        elif isinstance(message, Leave):
            self._body.engine.end()
        elif isinstance(message, Welcome):
            self._body.engine.watch_cache(self._cache_log)

    # -- a group that has come apart -------------------------------------------------------------

    def check_for_losses(self) -> None:
        """For whoever waits for a peer: raises `PeerLost` if the router says that it is in vain."""
        self._body.control.check_for_losses(self.layout.epoch)

    @property
    def stranded(self) -> bool:
        """Layers are missing, and there is no group to run with until the router has spoken."""
        return self.mode is Mode.RECOVERING

    def strand(self, reason: str) -> None:
        """The group has come apart: nothing that is in flight will ever return."""
        logger.warning("instance %d has lost its group: %s", self._me, reason)
        engine = self._body.engine
        self._pipeline = None
        self.transfer = None
        self._deferred.clear()
        self._pieces.clear()
        self._participant.give_up(reason)
        engine.give_up(f"the instances that ran this request's layers were lost: {reason}")
        engine.enter_cooperation([])  # no forward pass by itself until all layers are back
        self.mode = Mode.RECOVERING
        self.publish(force=True)

    def _recover(self, message: Lost) -> None:
        if message.broken != self.layout.epoch:
            return
        if not self.stranded:
            if not self.layout.cooperative:
                return  # a transition that never began has nothing to give up
            self.strand(message.reason)
        reload_dropped(self._body)
        alone = self._alone(message.epoch)
        map_capacities(self._body, alone)
        self.adopt(alone)
        self.publish(force=True)

    def _trace(self, message: Trace) -> None:
        spans: list[Span] = []
        lost = 0
        if message.record:
            self.tracer.start()
        else:
            spans, lost = self.tracer.stop()
        self._body.control.send(Traced(call=message.call, spans=tuple(spans), lost=lost))

    def adopt(self, layout: Layout) -> None:
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
                next_piece=self._next_piece,
                clock=body.clock,
                peer_timeout_s=self._timeout,
            )
            body.engine.enter_cooperation(list(layout.ids))
            self.mode = Mode.COOPERATIVE
        else:
            self._pipeline = None
            body.engine.leave_cooperation()
            self.mode = Mode.INDEPENDENT
        self.check_pages()

    def carry(self, transfer: Transfer | None) -> None:
        """Let pieces move while serving, until further notice."""
        self.transfer = transfer
        if self._pipeline is not None:
            self._pipeline.transfer = transfer

    def grow(self, layout: Layout) -> None:
        """All stages have mapped the larger capacities of `layout`; the pipeline goes on."""
        self.layout = layout
        self._body.engine.set_capacity(layout.member(self._me).capacity)
        self.check_pages()

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
