"""Cooperative execution: micro-batches travel owner -> stage 0 -> ... -> owner (section 4.2).

Single-threaded and without waiting: an owner puts micro-batches on their way and later collects
what came back; in between it runs its layers for whoever's micro-batch arrives. The loop that
decides what comes first lives with the runtime (`sglang_seam.cooperation`).
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial

import msgspec
import torch

from kunserve_sglang.core.errors import KunServeError, PeerLost, StageFailed
from kunserve_sglang.core.layout import Layout
from kunserve_sglang.execution.formation import PeerWork
from kunserve_sglang.instance.packets import packing, wire
from kunserve_sglang.instance.packets.request_table import MirroredRows
from kunserve_sglang.instance.parts.engine import Hidden, Segment, StageBatch
from kunserve_sglang.instance.parts.instance_parts import InstanceParts
from kunserve_sglang.instance.parts.trace import Tracer
from kunserve_sglang.instance.pipeline.screening import check_batch, check_hidden
from kunserve_sglang.instance.pipeline.sent_rows import sent_rows
from kunserve_sglang.instance.pipeline.under_way import OwnBatch, Peer, PipelineCounters
from kunserve_sglang.instance.transfer.transfer import Transfer
from kunserve_sglang.transport import Packet
from kunserve_sglang.transport.data import Malformed

logger = logging.getLogger(__name__)

_MAX_ROWS = 4352
"""Of SGLang's request table, by itself, for any budget: owners may have more rows than this one."""

_LOOK_INTERVAL_S = 0.5
_PATIENCE = 2
"""Peer timeouts that a micro-batch may be out while others come, before one without any."""

_SILENT_ROUNDS = 3
"""An owner that has sent nothing for so many rounds has no work."""


class Pipeline:
    """One member's part of a group, for one epoch."""

    def __init__(
        self,
        body: InstanceParts,
        layout: Layout,
        *,
        counters: PipelineCounters,
        tracer: Tracer,
        transfer: Callable[[], Transfer | None],
        next_piece: Callable[[], Packet | None],
        peer_timeout_s: float,
    ) -> None:
        """`transfer` gives what is on its way while the group serves, if anything is; `next_piece`
        the next packet of it, or None after a moment.
        """
        me, engine, kv = body.instance, body.engine, body.kv
        self._me, self._layout = me, layout
        self._transfer = transfer
        self._position = layout.position(me)
        self._layers = layout.member(me).layers
        self._engine = engine
        self._plane = body.plane
        self._counters = counters
        self._tracer = tracer
        self._costs = body.costs
        self._idle_since: float | None = None
        self._next_piece = next_piece
        self._clock = body.clock
        self._timeout = peer_timeout_s
        self._stride = kv.stride
        self._blank, _ = engine.blank_hidden(1)
        table = engine.request_table()
        rows, context = table.shape
        rows = max(rows, _MAX_ROWS)
        self._sent = sent_rows(table)
        self._peers = {
            m.instance: Peer(MirroredRows(rows, context, kv.base(m.instance), table.device))
            for m in layout.members
            if m.instance != me
        }
        self._sequence = 0
        self._round_ms = 0.0
        self._own: deque[OwnBatch] = deque()
        self._progress = self._looked = self._clock()

    @property
    def epoch(self) -> int:
        """Of the layout that placed the layers; capacities may have grown since."""
        return self._layout.epoch

    @property
    def stages(self) -> int:
        return len(self._layout.members)

    @property
    def in_flight(self) -> int:
        """Own micro-batches that were submitted and not collected."""
        return len(self._own)

    def peers_work(self) -> list[PeerWork]:
        """What the other owners have going round; those that fell silent have nothing."""
        now = self._clock()
        rounds = sum(p.work.round_ms for p in self._peers.values())
        silent_s = _SILENT_ROUNDS * (rounds + self._round_ms) / 1e3
        return [p.work for p in self._peers.values() if now - p.arrived < silent_s]

    def submit(self, batch: StageBatch, hidden: Hidden, segment: Segment, work: PeerWork) -> int:
        """Owner: put one micro-batch on its way; returns its number.

        Runs the own layers at once if they come first. `work` is for the other owners to know.
        """
        self._round_ms = work.round_ms
        reads = None
        if (transfer := self._transfer()) is not None:
            reads = self._sent.slots(batch.rows, batch.seq_lens)
            transfer.take_along(reads)
        batch, delta = self._sent.difference(batch)
        packed, described = packing.pack(batch, delta)
        self._progress = self._clock()
        self._end_idle(self._progress)
        header = wire.MicroBatch(
            sender=self._me,
            epoch=self._layout.epoch,
            owner=self._me,
            sequence=self._sequence,
            position=0,
            packed=packed,
            has_residual=hidden[1] is not None,
            launched=self._progress,
            cost_ms=work.batch_ms,
            round_ms=work.round_ms,
        )
        own = OwnBatch(header, batch, described, segment, reads)
        self._sequence += 1
        self._counters.own += 1
        self._own.append(own)
        self._pass_on(own, 0, hidden)
        return header.sequence

    def collect(self) -> tuple[int, Hidden] | None:
        """Owner: the oldest own micro-batch, if it is through all stages.

        Raises `PeerLost` if nothing at all has come from the group for the peer timeout, or this
        has not for some, and `StageFailed` in place of a micro-batch that a stage could not run.
        """
        if not self._own:
            return None
        own = self._own[0]
        if own.result is None:
            self._look_for_losses()
            return None
        self._own.popleft()
        if own.header.failed:
            raise StageFailed(f"{own.header.failed} in a stage")
        return own.header.sequence, own.result

    def serve(self, packet: Packet, header: wire.MicroBatch) -> None:
        """Run this stage's layers on a micro-batch that arrived, and pass it on.

        Raises `Malformed`, and does nothing, for one that nobody sends here; `PeerLost` at a gap.
        """
        self._progress = self._clock()
        self._end_idle(header.launched)
        if header.owner == self._me:
            self._returned(packet, header)
            return
        peer = self._peers.get(header.owner)
        if peer is None or header.position != self._position or header.packed is None:
            raise Malformed(f"micro-batch of {header.owner} at position {header.position}")
        described = wire.described_by(header, packet.tensors)
        batch, delta = packing.unpack(header.owner, header.packed, described)
        hidden = wire.hidden_of(header, packet.tensors)
        check_batch(batch, delta, table=peer.mirror.table.shape, stride=self._stride)
        check_hidden(hidden, len(batch.positions), self._blank)
        peer.follows(header, self._progress)
        peer.mirror.apply(delta)
        self._counters.foreign += 1
        if (transfer := self._transfer()) is not None:
            reads = peer.mirror.slots(batch.rows, batch.seq_lens)
            transfer.before_run(batch.owner, reads, batch.out_slots, self._next_piece)

        def run(hidden: Hidden) -> Hidden:
            table, base = peer.mirror.table, peer.mirror.base
            return self._engine.run_stage(batch, table, base, self._layers, hidden)

        header, hidden = self._run("peer's layers", header, batch, hidden, run)
        self._send(header, self._position + 1, described, hidden)

    def _look_for_losses(self) -> None:
        """Whether to wait for a micro-batch is in vain, or seems so. Raises `PeerLost`."""
        now = self._clock()
        left = self._own[0].header.launched + _PATIENCE * self._timeout
        if now - min(self._progress, left) > self._timeout:
            raise PeerLost(f"no packet from the group within {self._timeout:.0f} s")
        if now - max(self._progress, self._looked) > _LOOK_INTERVAL_S:
            self._looked = now
            if why := self._plane.lost(list(self._peers)):
                raise PeerLost(why)

    def begin_idle(self) -> None:
        """Nothing to do here until a packet arrives or something is submitted."""
        if self._idle_since is None:
            self._idle_since = time.monotonic()

    def _end_idle(self, work_since: float) -> None:
        """There is work, and it was on its way since `work_since`: the wait was a bubble."""
        if self._idle_since is not None:
            now = time.monotonic()
            begin = self._idle_since if self._own else max(self._idle_since, work_since)
            if begin < now:
                self._counters.bubble_s += now - begin
                self._tracer.add("wait", begin, now, {})
            self._idle_since = None

    def _returned(self, packet: Packet, header: wire.MicroBatch) -> None:
        own = next((o for o in self._own if o.header.sequence == header.sequence), None)
        if own is None or own.result is not None or not 0 < header.position <= self.stages:
            raise Malformed(f"micro-batch {header.sequence} came back unasked")
        hidden = wire.hidden_of(header, packet.tensors)
        check_hidden(hidden, len(own.batch.positions), self._blank)
        own.header = msgspec.structs.replace(own.header, failed=header.failed)
        self._pass_on(own, header.position, hidden)

    def _pass_on(self, own: OwnBatch, position: int, hidden: Hidden) -> None:
        """Run the own micro-batch here while the pipeline's next stage is this one."""
        if position == self._position:
            if (transfer := self._transfer()) is not None and own.reads is not None:
                writes = own.batch.out_slots
                transfer.before_run(self._me, own.reads, writes, self._next_piece)

            run = partial(own.segment, self._layers)
            own.header, hidden = self._run("own layers", own.header, own.batch, hidden, run)
            position += 1
        if position == self.stages:
            own.result = hidden
        else:
            self._send(own.header, position, own.described, hidden)

    def _run(
        self,
        name: str,
        header: wire.MicroBatch,
        batch: StageBatch,
        hidden: Hidden,
        run: Callable[[Hidden], Hidden],
    ) -> tuple[wire.MicroBatch, Hidden]:
        """Run this stage's layers; a failure is its owner's, and travels on in their place."""
        if header.failed:
            return header, hidden
        try:
            with self._measured(name, header, batch):
                return header, run(hidden)
        except KunServeError:
            raise
        except Exception as error:
            logger.exception("micro-batch %d of instance %d failed", header.sequence, header.owner)
            return msgspec.structs.replace(header, failed=type(error).__name__), hidden

    @contextlib.contextmanager
    def _measured(self, name: str, header: wire.MicroBatch, batch: StageBatch) -> Iterator[None]:
        """A span of stage work, from which the cost model learns as well."""
        started = self._clock()
        yield
        self._engine.settle()
        ended = self._clock()
        decode = int(batch.decode)
        details = {"owner": header.owner, "sequence": header.sequence, "decode": decode}
        self._tracer.add(name, started, ended, details)
        self._costs.observe(batch.work(), 1e3 * (ended - started) / len(self._layers))

    def _send(
        self,
        header: wire.MicroBatch,
        position: int,
        described: list[torch.Tensor],
        hidden: Hidden,
    ) -> None:
        members = self._layout.members
        target = header.owner if position == self.stages else members[position].instance
        home = target == header.owner
        header = msgspec.structs.replace(
            header,
            sender=self._me,
            position=position,
            packed=None if home else header.packed,
            has_residual=hidden[1] is not None,
        )
        tensors = wire.tensors_of([] if home else described, hidden)
        self._plane.send(target, wire.encode(header), tensors)
