"""Cooperative execution: micro-batches travel owner -> stage 0 -> ... -> owner (section 4.2).

Single-threaded on purpose: an owner that waits for its own micro-batch runs the layers of others
meanwhile, so that k owners keep k stages busy with no locks.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from kunserve_sglang.errors import InternalError, PeerLost
from kunserve_sglang.instance import wire
from kunserve_sglang.instance.engine import Engine, Hidden, Segment, StageBatch
from kunserve_sglang.instance.kv_store import KvStore
from kunserve_sglang.instance.request_table import MirroredRows, SentRows, TableDelta
from kunserve_sglang.layout import Layout
from kunserve_sglang.transport import DataPlane, Packet


@dataclass(slots=True)
class PipelineCounters:
    """Since start: own micro-batches, those of others, and seconds waited for peers."""

    own: int = 0
    foreign: int = 0
    wait_s: float = 0.0


@dataclass(slots=True)
class _OwnBatch:
    sequence: int
    batch: StageBatch
    delta: TableDelta
    segment: Segment
    result: Hidden | None = None


@dataclass(slots=True)
class _Peer:
    mirror: MirroredRows
    sequence: int = field(default=-1)


class Pipeline:
    """One member's part of a group, for one epoch."""

    def __init__(
        self,
        me: int,
        layout: Layout,
        *,
        engine: Engine,
        kv: KvStore,
        plane: DataPlane,
        counters: PipelineCounters,
        peer_timeout_s: float,
    ) -> None:
        self._me = me
        self._layout = layout
        self._position = layout.position(me)
        self._layers = layout.member(me).layers
        self._engine = engine
        self._plane = plane
        self._timeout = peer_timeout_s
        self._counters = counters
        table = engine.request_table()
        rows, context = table.shape
        self._sent = SentRows(table)
        self._peers = {
            m.instance: _Peer(MirroredRows(rows, context, kv.base(m.instance)))
            for m in layout.members
            if m.instance != me
        }
        self._sequence = 0
        self._own: _OwnBatch | None = None

    @property
    def epoch(self) -> int:
        return self._layout.epoch

    def run(self, batch: StageBatch, hidden: Hidden, segment: Segment) -> Hidden:
        """Owner: take one micro-batch through all stages; serves other owners while it waits.

        Raises `PeerLost` if no packet arrives for the peer timeout.
        """
        delta = self._sent.difference(batch.rows, batch.seq_lens)
        own = _OwnBatch(self._sequence, batch, delta, segment)
        self._sequence += 1
        self._own = own
        self._counters.own += 1
        try:
            self._pass_on(own, 0, hidden)
            while own.result is None:
                self._serve_one(self._timeout)
            return own.result
        finally:
            self._own = None

    def serve(self, packet: Packet, header: wire.MicroBatch) -> None:
        """Stage: run this stage's layers on a micro-batch that arrived, and pass it on."""
        own = self._own
        if header.owner == self._me:
            if own is None or own.sequence != header.sequence:
                raise InternalError(f"micro-batch {header.sequence} came back unasked")
            self._arrived(own, header, packet.tensors)
            return
        peer = self._peers[header.owner]
        if header.sequence != peer.sequence + 1:
            raise InternalError(
                f"micro-batch {header.sequence} of instance {header.owner} came after "
                f"{peer.sequence} (invariant 5)"
            )
        peer.sequence = header.sequence
        batch, delta, hidden = _unpack(header, packet.tensors)
        peer.mirror.apply(delta)
        self._counters.foreign += 1
        hidden = self._engine.run_stage(
            batch, peer.mirror.table, peer.mirror.base, self._layers, hidden
        )
        self._send(header.owner, header.sequence, self._position + 1, batch, delta, hidden)

    def _arrived(
        self, own: _OwnBatch, header: wire.MicroBatch, tensors: list[torch.Tensor]
    ) -> None:
        _, _, hidden = _unpack(header, tensors)
        self._pass_on(own, header.position, hidden)

    def _pass_on(self, own: _OwnBatch, position: int, hidden: Hidden) -> None:
        """Run the own micro-batch here while the pipeline's next stage is this one."""
        if position == self._position:
            hidden = own.segment(self._layers, hidden)
            position += 1
        if position == len(self._layout.members):
            own.result = hidden
        else:
            self._send(self._me, own.sequence, position, own.batch, own.delta, hidden)

    def _send(
        self,
        owner: int,
        sequence: int,
        position: int,
        batch: StageBatch,
        delta: TableDelta,
        hidden: Hidden,
    ) -> None:
        members = self._layout.members
        target = owner if position == len(members) else members[position].instance
        header = wire.MicroBatch(
            sender=self._me,
            epoch=self.epoch,
            owner=owner,
            sequence=sequence,
            position=position,
            decode=batch.decode,
            has_residual=hidden[1] is not None,
        )
        self._plane.send(target, wire.encode(header), _pack(batch, delta, hidden))

    def _serve_one(self, timeout_s: float) -> None:
        started = time.perf_counter()
        packet = self._plane.receive(timeout_s)
        self._counters.wait_s += time.perf_counter() - started
        if packet is None:
            raise PeerLost(f"no packet from the group within {timeout_s:.0f} s")
        header = wire.decode(packet.header)
        if header.epoch != self.epoch:
            return
        if not isinstance(header, wire.MicroBatch):
            raise InternalError(f"{type(header).__name__} in the middle of a step")
        self.serve(packet, header)


def _pack(batch: StageBatch, delta: TableDelta, hidden: Hidden) -> list[torch.Tensor]:
    tensors = [batch.seq_lens, batch.positions, batch.out_slots]
    tensors += [delta.rows, delta.starts, delta.lengths, delta.slots]
    if batch.prefix_lens is not None and batch.extend_lens is not None:
        tensors += [batch.prefix_lens, batch.extend_lens]
    tensors += [t for t in hidden if t is not None]
    return tensors


def _unpack(
    header: wire.MicroBatch, tensors: list[torch.Tensor]
) -> tuple[StageBatch, TableDelta, Hidden]:
    queue = iter(tensors)
    seq_lens, positions, out_slots = next(queue), next(queue), next(queue)
    delta = TableDelta(next(queue), next(queue), next(queue), next(queue))
    batch = StageBatch(
        owner=header.owner,
        rows=delta.rows,
        seq_lens=seq_lens,
        positions=positions,
        out_slots=out_slots,
        prefix_lens=None if header.decode else next(queue),
        extend_lens=None if header.decode else next(queue),
    )
    hidden = next(queue), next(queue) if header.has_residual else None
    return batch, delta, hidden
