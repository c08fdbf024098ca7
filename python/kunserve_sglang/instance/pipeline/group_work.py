"""What a member runs for its group: its pipeline, what is on its way, and packets that wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from kunserve_sglang.core.dropped import Dropped
from kunserve_sglang.core.errors import InternalError
from kunserve_sglang.core.layout import Layout
from kunserve_sglang.instance.packets import wire
from kunserve_sglang.instance.parts.instance_parts import InstanceParts
from kunserve_sglang.instance.parts.trace import Tracer
from kunserve_sglang.instance.pipeline.pipeline import Pipeline
from kunserve_sglang.instance.pipeline.under_way import PipelineCounters
from kunserve_sglang.instance.transfer.transfer import Transfer
from kunserve_sglang.transport import Packet
from kunserve_sglang.transport.data import Malformed

_PIECE_WAIT_S = 0.001
_BACKGROUND_SHARE = 0.1
"""How much of the time goes into what nobody waits for."""


class GroupWork:
    """What is run is decided by whoever changes the layout; this only runs it."""

    def __init__(
        self,
        body: InstanceParts,
        *,
        check_for_losses: Callable[[], None],
        peer_timeout_s: float,
    ) -> None:
        """`check_for_losses` raises `PeerLost` if waiting for a peer is in vain."""
        self._body = body
        self._check_for_losses = check_for_losses
        self._timeout = peer_timeout_s
        self._pipeline: Pipeline | None = None
        self._batches: deque[tuple[Packet, wire.Header]] = deque()
        self._pieces: deque[tuple[Packet, wire.Header]] = deque()
        self.transfer: Transfer | None = None
        """What moves while serving."""
        self.tracer = Tracer()
        self.counters = PipelineCounters()
        self.stale_packets = 0
        self._dropped = Dropped()

    @property
    def malformed_packets(self) -> int:
        """Packets that were dropped because no member sends them like that."""
        return self._body.plane.malformed + self._dropped.count

    @property
    def pipeline(self) -> Pipeline:
        """Only while there is a group; raises `InternalError` otherwise."""
        if self._pipeline is None:
            raise InternalError("no pipeline in independent mode")
        return self._pipeline

    @property
    def epoch(self) -> int | None:
        """Of the pipeline; None in independent mode."""
        return None if self._pipeline is None else self._pipeline.epoch

    # -- what is run -----------------------------------------------------------------------------

    def begin(self, layout: Layout) -> None:
        """Run by this cooperative layout from now on."""
        self._pipeline = Pipeline(
            self._body,
            layout,
            counters=self.counters,
            tracer=self.tracer,
            transfer=lambda: self.transfer,
            next_piece=self._next_piece,
            peer_timeout_s=self._timeout,
        )

    def end(self) -> None:
        """There is no group any more."""
        self._pipeline = None

    def drop(self) -> None:
        """The group has come apart: forget all that is in flight."""
        self._pipeline = None
        self.transfer = None
        self._batches.clear()
        self._pieces.clear()

    # -- work for peers --------------------------------------------------------------------------

    def serve_one(self, timeout_s: float) -> bool:
        """Do what a packet of a peer asks for; false if none came in time.

        Activations go first, whatever arrived before them. Rows go that stages wait for.
        """
        if self.transfer is not None:
            self.transfer.send_asked()
        packet = self._body.plane.receive(0.0 if self._batches or self._pieces else timeout_s)
        while packet is not None:
            self.defer(packet)
            packet = self._body.plane.receive()
        return self.serve_deferred()

    def serve_deferred(self) -> bool:
        """Do what a packet that is here already asks for; false if there is none."""
        waiting = self._batches or self._pieces
        if not waiting:
            return False
        self._serve(*waiting.popleft())
        return True

    def serve(self, packet: Packet) -> None:
        """Do what this packet asks for, before all that waits."""
        self._serve(packet, wire.decode(packet.header))

    def defer(self, packet: Packet) -> None:
        """Keep a packet for later, in the order of its kind."""
        header = wire.decode(packet.header)
        queue = self._batches if isinstance(header, wire.MicroBatch) else self._pieces
        queue.append((packet, header))

    def move_pieces(self, busy_s: float) -> bool:
        """Send and keep some of what is on its way, after `busy_s` of work; false if nothing was.

        What has come gets as much time as what goes: where activations always wait, nobody would
        come to it otherwise, and the peer could send no more.
        """
        if (transfer := self.transfer) is None:
            return False
        seconds = busy_s * (1.0 if transfer.urgent else _BACKGROUND_SHARE)
        kept = transfer.for_about(seconds, self._keep_piece)
        return transfer.pump(seconds) or kept

    def _serve(self, packet: Packet, header: wire.Header) -> None:
        if self._pipeline is None or header.epoch != self._pipeline.epoch:
            self.stale_packets += 1
        elif isinstance(header, wire.MicroBatch):
            try:
                self._pipeline.serve(packet, header)
            except Malformed as error:
                self._dropped.because(error)
        elif self.transfer is not None:
            self.transfer.store(packet, header)
        else:
            self.stale_packets += 1  # fetched ahead, for a transition that was given up

    def _keep_piece(self) -> bool:
        """False if none is here."""
        if not self._pieces:
            return False
        self._serve(*self._pieces.popleft())
        return True

    def _next_piece(self) -> Packet | None:
        """The next packet of a transfer, for a stage that cannot go on without it."""
        self._check_for_losses()
        if not self._pieces and (packet := self._body.plane.receive(_PIECE_WAIT_S)) is not None:
            self.defer(packet)
        return self._pieces.popleft()[0] if self._pieces else None
