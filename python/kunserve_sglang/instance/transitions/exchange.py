"""The part of a transition for which all members stand still (paper section 4.3).

All members run `Exchange.run` at the same time, each at a step boundary. The same steps serve
every transition; which layers go and come follows from the layouts before and after:

1. barrier: every owner tells all participants its taken slots, before and after compaction;
2. slots above the new capacity are compacted, where their rows are now;
3. rows that leave this member are sent, unless they may follow while it serves;
4. dropped layers and what has left give their pages back; what stays shrinks to what is needed,
   so that step 5 always finds its pages;
5. parameters and rows that arrive get pages and are received;
6. every owner's sub-range grows to its new capacity.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from kunserve_sglang.core import faults
from kunserve_sglang.core.errors import (
    MappingRefused,
    OutOfPages,
    PeerLost,
    TransitionTimeout,
)
from kunserve_sglang.core.layout import Layout, kv_moves, layout_of, parameter_loads
from kunserve_sglang.core.messages import Transition, TransitionStats
from kunserve_sglang.instance.packets import wire
from kunserve_sglang.instance.parts.instance_parts import InstanceParts
from kunserve_sglang.instance.transfer.transfer import Transfer
from kunserve_sglang.instance.transitions.compaction import SlotChange, compact
from kunserve_sglang.instance.transitions.mapping import map_capacities, persistently
from kunserve_sglang.transport import Packet

_POLL_INTERVAL_S = 0.1
"""How often to ask whether whom we wait for is still there."""


class Exchange:
    """One member's side of one transition."""

    def __init__(
        self,
        body: InstanceParts,
        transition: Transition,
        *,
        running: int | None,
        fetched: Transfer | None,
        defer: Callable[[Packet], None],
        timeout_s: float,
    ) -> None:
        """`running` is the epoch of the pipeline that stands still, if there is one.

        `fetched` is what has been brought ahead for this transition, if it has. `defer` keeps
        micro-batches until this member runs them: those of the new epoch's pipeline, or those of
        the old one's if it goes on after all.
        """
        self._body = body
        self._me = body.instance
        self._transition = transition
        self._before = layout_of(transition.before, self._me)
        self.after = layout_of(transition.after, self._me)
        self._fetched = fetched
        self._fetched_epoch = fetched.epoch if fetched else None
        self._defer = defer
        self._timeout = timeout_s
        self._clock = body.clock
        self._participants = [m.instance for layout in transition.before for m in layout.members]
        self._old_layers = self._before.member(self._me).layers
        self._new_layers = self.after.member(self._me).layers
        self._started = time.perf_counter()
        self._changes: dict[int, SlotChange] = {}
        self._early: list[Packet] = []
        self._running = running
        self._old: list[Packet] = []
        self.left: Transfer | None = None
        """What goes on while serving, once `run` has ended."""

    def run(self, first_packets: list[Packet], join_by: float, deadline: float) -> TransitionStats:
        """Do it all. Takes `first_packets` over.

        Nobody reaches the barrier after `join_by`, and nothing is waited for after `deadline`, in
        monotonic seconds. Raises `TransitionTimeout` from the barrier, while nothing has changed
        yet, and `PeerLost` after it, when layers or KV may be gone and the member has to recover.
        So it has if the system does not map its pages: the others run by the new layout, there is
        no way back.
        """
        try:
            self._barrier(first_packets, join_by)
        except PeerLost as error:
            self._give_back()
            raise TransitionTimeout(str(error)) from error
        except TransitionTimeout:
            self._give_back()
            raise
        faults.at("transition.joined")
        try:
            return self._change(deadline)
        except (MappingRefused, OutOfPages) as error:
            reason = f"this instance cannot map its part of the new layout: {error}"
            raise PeerLost(reason) from error

    def _change(self, deadline: float) -> TransitionStats:
        """Steps 2 to 6."""
        self._compact()
        faults.at("transition.compacted")
        transition = self._transition
        transfer = self._fetched or self._transfer(transition.before, transition.after)
        live = transition.live
        sent_before = transfer.sent_kv_bytes
        if not live:
            taken = {owner: change.target for owner, change in self._changes.items()}
            transfer.send_rest(transition.epoch, taken)
        remap_started = time.perf_counter()
        freed = persistently(lambda: self._release(transfer, keep_leaving=live))
        faults.at("transition.released")
        persistently(lambda: self._make_room(transfer))
        remap_s = time.perf_counter() - remap_started
        if not live:
            transfer.receive_rest(self._next_packet, deadline)
            faults.at("transition.received")
        remap_started = time.perf_counter()
        persistently(lambda: map_capacities(self._body, self.after))
        faults.at("transition.mapped")
        remap_s += time.perf_counter() - remap_started
        for packet in self._early:
            self._defer(packet)
        self.left = transfer if live else persistently(self._fetch_ahead)
        own = self._changes[self._me]
        if own.moved:
            self._body.engine.relocate(own.source, own.target)
        return TransitionStats(
            freed_bytes=freed,
            loaded_bytes=self._body.parameters.nbytes(transfer.layers),
            sent_kv_bytes=transfer.sent_kv_bytes - sent_before,
            moved_slots=own.moved,
            remap_ms=1e3 * remap_s,
            stall_ms=1e3 * (time.perf_counter() - self._started),
        )

    # -- step 1 ----------------------------------------------------------------------------------

    def _barrier(self, packets: list[Packet], deadline: float) -> None:
        taken = self._body.engine.taken_slots()
        block = self._body.profile.block_slots
        mine = compact(taken, self.after.member(self._me).capacity, block)
        self._changes[self._me] = mine
        header = wire.encode(wire.TakenSlots(sender=self._me, epoch=self._transition.epoch))
        for peer in self._participants:
            if peer != self._me:
                self._body.plane.send(peer, header, [mine.source, mine.target])
        missing = set(self._participants) - {self._me}
        while missing:
            packet = packets.pop(0) if packets else self._receive(deadline)
            if packet is None:
                raise TransitionTimeout(f"members {sorted(missing)} did not reach the barrier")
            received = wire.decode(packet.header)
            if received.epoch != self._transition.epoch:
                if isinstance(received, wire.MicroBatch):
                    self._old.append(packet)
                    self._check_standstill(received)
                else:
                    self._keep_fetched(packet, received)
            elif isinstance(received, wire.TakenSlots):
                if received.sender not in missing:
                    continue  # said again, or by somebody who takes no part
                missing.remove(received.sender)
                # Copies: what arrived lies in memory that the sender wants back.
                source, target = (t.clone().cpu() for t in packet.tensors)
                self._changes[received.sender] = SlotChange(source, target, block)
            else:
                # A faster member is past its barrier already; its data waits its turn.
                self._early.append(packet)
        self._early += packets
        packets.clear()

    def _check_standstill(self, batch: wire.MicroBatch) -> None:
        """All have stood still to vote: one that runs again waits for no decision any more."""
        if batch.epoch == self._running:
            raise TransitionTimeout(f"instance {batch.sender} goes on as before")

    def _give_back(self) -> None:
        """The members go on as before, and with the work of before."""
        for packet in self._old:
            self._defer(packet)

    # -- step 2 ----------------------------------------------------------------------------------

    def _compact(self) -> None:
        kv = self._body.kv
        for owner in self._before.ids:
            change = self._changes[owner]
            if not change.moved:
                continue
            changed = change.source != change.target
            source, target = change.source[changed], change.target[changed]
            for layer in self._old_layers:
                kv.move(layer, owner, source, target)
            if self._fetched is not None:
                self._fetched.rewritten(owner, target)

    # -- steps 3 to 6 ----------------------------------------------------------------------------

    def _transfer(self, start: tuple[Layout, ...], goal: tuple[Layout, ...]) -> Transfer:
        """All that is placed as in `start` and that `goal` needs elsewhere."""
        body = self._body
        return Transfer(
            self._me,
            self._transition.epoch,
            moves=kv_moves(start, goal),
            loads=parameter_loads(start, goal),
            taken={owner: change.target for owner, change in self._changes.items()},
            serving=self._new_layers,
            kv=body.kv,
            parameters=body.parameters,
            plane=body.plane,
            clock=body.clock,
            timeout_s=self._timeout,
            urgent=self._transition.urgent,
        )

    def _release(self, transfer: Transfer, *, keep_leaving: bool) -> int:
        """Give back what is not needed here any more; returns the bytes of parameters freed."""
        kv, parameters = self._body.kv, self._body.parameters
        staying = set(self.after.ids)
        leaving = {(m.owner, layer) for m in transfer.leaving for layer in m.layers}
        arriving = {(m.owner, layer) for m in transfer.arriving for layer in m.layers}
        for owner in kv.owners():
            for layer in range(self._body.engine.layer_count):
                if not kv.slots(layer, owner) or (owner, layer) in arriving:
                    continue
                if owner in staying and layer in self._new_layers:
                    kv.resize(layer, owner, self._changes[owner].highest)
                elif not (keep_leaving and (owner, layer) in leaving):
                    kv.release(layer, owner)
            if owner not in staying:
                kv.dismiss(owner)
        dropped = self._old_layers.minus(self._new_layers)
        for layer in set(dropped).intersection(parameters.held()):
            parameters.drop(layer)
        return parameters.nbytes(dropped)

    def _make_room(self, transfer: Transfer) -> None:
        if transfer is self._fetched:
            return
        for owner in self.after.ids:
            self._body.kv.admit(owner)
        transfer.reserve(lambda owner: self._changes[owner].highest)

    def _fetch_ahead(self) -> Transfer | None:
        """Begin to fetch what the layouts to come will need here."""
        transition = self._transition
        if not transition.ahead:
            return None
        transfer = self._transfer(transition.after, transition.ahead)
        transfer.reserve(lambda owner: self.after.member(owner).capacity)
        faults.at("restore.reserved")
        return transfer

    # -- receiving -------------------------------------------------------------------------------

    def _next_packet(self, until: float) -> Packet | None:
        """The next packet of the transfer; keeps what the pipeline will need."""
        packet = self._early.pop(0) if self._early else self._receive(until)
        if packet is None:
            return None
        header = wire.decode(packet.header)
        if header.epoch != self._transition.epoch:
            self._keep_fetched(packet, header)
            return None
        if isinstance(header, wire.MicroBatch):
            self._defer(packet)
            return None
        return packet

    def _keep_fetched(self, packet: Packet, header: wire.Header) -> None:
        """A piece that was sent ahead may come after the barrier, which has overtaken it."""
        if self._fetched is not None and header.epoch == self._fetched_epoch:
            self._fetched.store(packet, header)

    def _receive(self, deadline: float) -> Packet | None:
        """The next packet, or None at the deadline.

        Raises `PeerLost` as soon as the router says that a member has gone, or its connection ends.
        """
        while True:
            left = deadline - self._clock()
            packet = self._body.plane.receive(max(0.0, min(left, _POLL_INTERVAL_S)))
            if packet is not None or left <= 0:
                return packet
            self._body.check_for_losses(self._before.epoch, self._participants)
