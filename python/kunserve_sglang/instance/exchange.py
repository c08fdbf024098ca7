"""The data movement of a transition: drop, KV exchange, restore (paper section 4.3).

All members run `Exchange.run` at the same time, each at a step boundary. The same steps serve
every transition; which layers go and come follows from the layouts before and after:

1. barrier: every owner tells all participants its taken slots, before and after compaction;
2. KV that leaves this member is packed and sent;
3. dropped layers and KV that moved away give their pages back; what stays shrinks to what is
   needed, so that step 4 always finds its pages;
4. parameters that come back and KV that arrives get pages and are received, while parameters that
   others need are sent piece by piece;
5. every owner's sub-range grows to its new capacity.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from kunserve_sglang.errors import InternalError, PeerLost, TransitionTimeout
from kunserve_sglang.instance import wire
from kunserve_sglang.instance.engine import Engine
from kunserve_sglang.instance.kv_store import KvStore
from kunserve_sglang.instance.parameters import ParameterStore
from kunserve_sglang.layout import Layout, ParameterLoad, kv_moves, parameter_loads
from kunserve_sglang.messages import Transition, TransitionStats
from kunserve_sglang.transport import DataPlane, Packet

_PIECE_BYTES = 1 << 20
"""Parameters travel in pieces: large enough to copy fast, small enough to leave room for others."""

_ROOM_WAIT_S = 0.001
_PATIENCE_S = 0.05


@dataclass(frozen=True, slots=True)
class SlotChange:
    """The taken slots of an owner: `source[i]` becomes `target[i]` (equal unless compacted)."""

    source: torch.Tensor
    target: torch.Tensor

    @property
    def highest(self) -> int:
        return int(self.target.max()) if len(self.target) else 0

    @property
    def moved(self) -> int:
        return int((self.source != self.target).sum())


def compact(taken: torch.Tensor, capacity: int) -> SlotChange:
    """Move slots above `capacity` to the lowest free ones; raises `InternalError` if too many."""
    high = taken > capacity
    low = taken[~high]
    used = torch.zeros(capacity + 1, dtype=torch.bool)
    used[low] = True
    used[0] = True
    room = torch.nonzero(~used).flatten()[: int(high.sum())]
    if len(room) < int(high.sum()):
        raise InternalError(f"{len(taken)} slots cannot be compacted into {capacity}")
    target = taken.clone()
    target[high] = room
    return SlotChange(taken, target)


@dataclass(slots=True)
class _Due:
    """What has to arrive: parameters with the memory they go to, and KV by owner and layer."""

    layers: dict[int, torch.Tensor]
    rows: set[tuple[int, int]]
    arrived: Counter[int] = field(default_factory=Counter)

    def __bool__(self) -> bool:
        return bool(self.layers or self.rows)


class Exchange:
    """One member's side of one transition."""

    def __init__(
        self,
        me: int,
        transition: Transition,
        *,
        engine: Engine,
        parameters: ParameterStore,
        kv: KvStore,
        plane: DataPlane,
        defer: Callable[[Packet], None],
    ) -> None:
        """`defer` keeps packets of the new epoch's pipeline until this member is there too."""
        self._me = me
        self._epoch = transition.epoch
        self._before = _layout_of(transition.before, me)
        self.after = _layout_of(transition.after, me)
        self._engine = engine
        self._parameters = parameters
        self._kv = kv
        self._plane = plane
        self._defer = defer
        self._participants = [m.instance for layout in transition.before for m in layout.members]
        self._moves = kv_moves(transition.before, transition.after)
        self._loads = parameter_loads(transition.before, transition.after)
        self._old_layers = self._before.member(me).layers
        self._new_layers = self.after.member(me).layers
        self._changes: dict[int, SlotChange] = {}
        self._early: list[Packet] = []
        self._sent_kv = 0

    def run(self, first_packets: list[Packet], deadline: float) -> TransitionStats:
        """Do it all; `deadline` is in monotonic seconds. Takes `first_packets` over.

        Raises `TransitionTimeout` from the barrier, while nothing has changed yet, and `PeerLost`
        after it, when layers or KV may be gone and the member has to recover.
        """
        started = time.perf_counter()
        self._barrier(first_packets, deadline)
        self._send_all()
        remap_started = time.perf_counter()
        freed = self._release()
        remap_s = time.perf_counter() - remap_started
        loaded = self._receive_all(deadline)
        remap_started = time.perf_counter()
        self._settle()
        remap_s += time.perf_counter() - remap_started
        own = self._changes[self._me]
        if own.moved:
            self._engine.relocate(own.source, own.target)
        return TransitionStats(
            freed_bytes=freed,
            loaded_bytes=loaded,
            sent_kv_bytes=self._sent_kv,
            moved_slots=own.moved,
            remap_ms=1e3 * remap_s,
            stall_ms=1e3 * (time.perf_counter() - started),
        )

    # -- step 1 ----------------------------------------------------------------------------------

    def _barrier(self, packets: list[Packet], deadline: float) -> None:
        mine = compact(self._engine.taken_slots(), self.after.member(self._me).capacity)
        self._changes[self._me] = mine
        header = wire.encode(wire.TakenSlots(sender=self._me, epoch=self._epoch))
        for peer in self._participants:
            if peer != self._me:
                self._plane.send(peer, header, [mine.source, mine.target])
        while len(self._changes) < len(self._participants):
            packet = packets.pop(0) if packets else self._receive(deadline)
            if packet is None:
                missing = set(self._participants) - set(self._changes)
                raise TransitionTimeout(f"members {sorted(missing)} did not reach the barrier")
            received = wire.decode(packet.header)
            if received.epoch != self._epoch:
                continue
            if isinstance(received, wire.TakenSlots):
                # Copies: what arrived lies in memory that the sender wants back.
                self._changes[received.sender] = SlotChange(*(t.clone() for t in packet.tensors))
            else:
                # A faster member is past its barrier already; its data waits its turn.
                self._early.append(packet)
        self._early += packets
        packets.clear()

    # -- step 2 ----------------------------------------------------------------------------------

    def _send_all(self) -> None:
        for move in self._moves:
            if move.source == self._me:
                change = self._changes[move.owner]
                k, v = self._kv.gather(move.layer, move.owner, change.source)
                rows = wire.KvRows(
                    sender=self._me, epoch=self._epoch, owner=move.owner, layer=move.layer
                )
                self._plane.send(move.target, wire.encode(rows), [k, v])
                self._sent_kv += k.nbytes + v.nbytes
        self._compact_what_stays()

    def _compact_what_stays(self) -> None:
        for owner in self.after.ids:
            change = self._changes[owner]
            if not change.moved or owner not in self._kv.owners():
                continue
            changed = change.source != change.target
            source, target = change.source[changed], change.target[changed]
            for layer in self._new_layers:
                if self._kv.slots(layer, owner):
                    k, v = self._kv.gather(layer, owner, source)
                    self._kv.scatter(layer, owner, target, k, v)

    # -- step 3 ----------------------------------------------------------------------------------

    def _release(self) -> int:
        staying = set(self.after.ids)
        for owner in self._kv.owners():
            for layer in range(self._engine.layer_count):
                if not self._kv.slots(layer, owner):
                    continue
                if owner not in staying or layer not in self._new_layers:
                    self._kv.release(layer, owner)
                else:
                    self._kv.resize(layer, owner, self._changes[owner].highest)
            if owner not in staying:
                self._kv.dismiss(owner)
        dropped = self._old_layers.minus(self._new_layers)
        for layer in dropped:
            self._parameters.drop(layer)
        return self._parameters.nbytes(dropped)

    # -- step 4 ----------------------------------------------------------------------------------

    def _pieces(self) -> Iterator[tuple[ParameterLoad, int, torch.Tensor]]:
        """What this member has to send of parameters; no transition that loads drops any."""
        for load in self._loads:
            if load.source == self._me:
                data = self._parameters.bytes_of(load.layer)
                for offset in range(0, len(data), _PIECE_BYTES):
                    yield load, offset, data[offset : offset + _PIECE_BYTES]

    def _send_pieces(
        self, pieces: deque[tuple[ParameterLoad, int, torch.Tensor]], *, at_least: int
    ) -> None:
        """Send what finds room: the same few megabytes of shared memory serve for everything.

        `at_least` so many go even if there is none: a peer may hold on to what it has received.
        """
        while pieces:
            if at_least <= 0 and self._plane.room(pieces[0][0].target) < _PIECE_BYTES:
                return
            at_least -= 1
            load, offset, data = pieces.popleft()
            header = wire.LayerParameters(
                sender=self._me, epoch=self._epoch, layer=load.layer, offset=offset
            )
            self._plane.send(load.target, wire.encode(header), [data])

    def _receive_all(self, deadline: float) -> int:
        for owner in self.after.ids:
            self._kv.admit(owner)
        layers = [load.layer for load in self._loads if load.target == self._me]
        due = _Due(
            layers={layer: self._parameters.reserve(layer) for layer in layers},
            rows={(m.owner, m.layer) for m in self._moves if m.target == self._me},
        )
        for owner, layer in due.rows:
            self._kv.resize(layer, owner, self._changes[owner].highest)
        pieces = deque(self._pieces())
        left, patience = len(pieces), time.monotonic() + _PATIENCE_S
        while pieces or due:
            self._send_pieces(pieces, at_least=int(time.monotonic() > patience))
            if len(pieces) < left:
                left, patience = len(pieces), time.monotonic() + _PATIENCE_S
            if due:
                self._take_one(due, deadline, waiting_to_send=bool(pieces))
            elif pieces:
                time.sleep(_ROOM_WAIT_S)  # nothing else to do until a peer has read some
            if pieces and time.monotonic() > deadline:
                raise PeerLost(f"instance {pieces[0][0].target} does not take its parameters")
        for packet in self._early:
            self._defer(packet)
        return self._parameters.nbytes(layers)

    def _take_one(self, due: _Due, deadline: float, *, waiting_to_send: bool) -> None:
        wait = time.monotonic() + _ROOM_WAIT_S if waiting_to_send else deadline
        packet = self._early.pop(0) if self._early else self._receive(wait)
        if packet is not None:
            self._store(packet, due)
        elif time.monotonic() > deadline:
            raise PeerLost(f"waited for layers {sorted(due.layers)} and KV of {sorted(due.rows)}")

    def _store(self, packet: Packet, due: _Due) -> None:
        header = wire.decode(packet.header)
        if header.epoch != self._epoch:
            return
        if isinstance(header, wire.LayerParameters):
            data, layer = packet.tensors[0], header.layer
            due.layers[layer][header.offset : header.offset + len(data)] = data
            due.arrived[layer] += len(data)
            if due.arrived[layer] == len(due.layers[layer]):
                self._parameters.attach(layer)
                del due.layers[layer]
        elif isinstance(header, wire.KvRows):
            due.rows.remove((header.owner, header.layer))
            k, v = packet.tensors
            slots = self._changes[header.owner].target
            self._kv.scatter(header.layer, header.owner, slots, k, v)
        elif isinstance(header, wire.MicroBatch):
            self._defer(packet)
        else:
            raise InternalError(f"{type(header).__name__} after the barrier")

    # -- step 5 ----------------------------------------------------------------------------------

    def _settle(self) -> None:
        for member in self.after.members:
            for layer in self._new_layers:
                self._kv.resize(layer, member.instance, member.capacity)

    def _receive(self, deadline: float) -> Packet | None:
        return self._plane.receive(max(0.0, deadline - time.monotonic()))


def _layout_of(layouts: tuple[Layout, ...], instance: int) -> Layout:
    for layout in layouts:
        if instance in layout.ids:
            return layout
    raise InternalError(f"instance {instance} takes no part in the transition")
