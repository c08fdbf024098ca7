"""KV rows and parameters that change hands because of a transition (paper section 4.3).

A transfer can be carried out at a stroke, while everybody stands still (`send_rest`, then
`receive_rest`), or go on while the members serve:

- After a drop, rows follow their layers. A micro-batch takes the rows that it needs along with it,
  so a request resumes with its own KV and new requests do not wait for anybody's; what no
  micro-batch asks for goes piece by piece. A stage that is asked for rows on their way waits.
- Before a restore, parameters and rows are fetched ahead. Rows that are written meanwhile are sent
  once more, the last of them at the switch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from kunserve_sglang.core.errors import PeerLost
from kunserve_sglang.core.layout import LayerRange, Move, ParameterLoad
from kunserve_sglang.instance.pipeline import packing, wire
from kunserve_sglang.instance.store.kv_store import KvStore
from kunserve_sglang.instance.store.parameters import ParameterStore
from kunserve_sglang.instance.transfer.parameter_pieces import ParameterPieces
from kunserve_sglang.transport import DataPlane, Packet

_PIECE_BYTES = 256 << 10
_DEVICE_PIECE_BYTES = 4 << 20
"""Large enough to copy fast, small enough to let activations pass between two.

Beside a GPU a piece costs two kernels a layer and a wait for them, however small it is.
"""

_RESERVED_BYTES = 4 << 20
"""Room that is left to activations: they always go first."""

_WAIT_S = 0.001
_PATIENCE_S = 0.05


@dataclass(slots=True)
class _Outgoing:
    """`pending`: slots whose rows the target does not have, bool by slot."""

    move: Move
    pending: torch.Tensor


@dataclass(slots=True)
class _Incoming:
    """`awaited`: slots whose rows are on their way, bool by slot."""

    move: Move
    awaited: torch.Tensor
    ended: bool = False


class Transfer:
    """One member's side of what changes hands."""

    def __init__(
        self,
        me: int,
        epoch: int,
        *,
        moves: Iterable[Move],
        loads: Iterable[ParameterLoad],
        taken: Mapping[int, torch.Tensor],
        serving: LayerRange,
        kv: KvStore,
        parameters: ParameterStore,
        plane: DataPlane,
        clock: Callable[[], float],
        timeout_s: float,
    ) -> None:
        """`taken` are the slots of each owner that have rows to move; `serving` the layers that
        this member runs until all is done.
        """
        self._me = me
        self._epoch = epoch
        self._serving = serving
        self._kv = kv
        self._plane = plane
        self._clock = clock
        self._timeout = timeout_s
        self._piece_bytes = _PIECE_BYTES if kv.device.type == "cpu" else _DEVICE_PIECE_BYTES
        moves = list(moves)
        self._outgoing = [_Outgoing(m, self._mask(taken[m.owner])) for m in moves if m.source == me]
        self._incoming = {
            (m.owner, m.layers): _Incoming(m, self._mask(taken[m.owner]))
            for m in moves
            if m.target == me
        }
        self._pieces = ParameterPieces(
            me, list(loads), store=parameters, plane=plane, piece_bytes=self._piece_bytes
        )
        self.sent_kv_bytes = 0

    # -- what it is about ------------------------------------------------------------------------

    @property
    def arriving(self) -> list[Move]:
        """KV that comes to this member."""
        return [i.move for i in self._incoming.values()]

    @property
    def leaving(self) -> list[Move]:
        """KV that goes away from here."""
        return [o.move for o in self._outgoing]

    @property
    def layers(self) -> list[int]:
        """Layers whose parameters come to this member."""
        return self._pieces.layers

    @property
    def complete(self) -> bool:
        """Nothing is left to send, and everything asked for is here."""
        return not (
            self.unfinished
            or self._pieces.due
            or any(bool(i.awaited.any()) for i in self._incoming.values())
        )

    @property
    def urgent(self) -> bool:
        """Memory waits for rows to leave; otherwise there is time."""
        return any(not self._serves(move) for move in self.leaving)

    @property
    def unfinished(self) -> bool:
        """There is something to send."""
        return self._pieces.unsent > 0 or any(bool(o.pending.any()) for o in self._outgoing)

    def reserve(self, slots: Callable[[int], int]) -> None:
        """Map memory for what arrives: of an owner's KV, so many slots. Raises `OutOfPages`."""
        self._pieces.reserve()
        for move in self.arriving:
            for layer in move.layers:
                self._kv.resize(layer, move.owner, slots(move.owner))

    def release_left(self) -> None:
        """Give back the memory of rows that have left for good."""
        for move in self.leaving:
            if not self._serves(move):
                for layer in move.layers:
                    self._kv.release(layer, move.owner)

    def cancel(self) -> None:
        """Forget what has been fetched ahead: its memory is needed otherwise."""
        self._pieces.cancel()
        for move in self.arriving:
            for layer in move.layers:
                self._kv.release(layer, move.owner)

    # -- while serving ---------------------------------------------------------------------------

    def take_along(self, slots: torch.Tensor) -> None:
        """Send the rows of these own slots now: a micro-batch that reads them leaves next."""
        for out in self._outgoing:
            if out.move.owner == self._me:
                self._send_rows(out, torch.unique(slots[out.pending[slots]]))

    def unsent(self, slots: torch.Tensor) -> int:
        """Bytes that `take_along` would send for these slots."""
        return sum(
            int(out.pending[slots].sum()) * self._row_bytes(out.move)
            for out in self._outgoing
            if out.move.owner == self._me
        )

    def rewritten(self, owner: int, slots: torch.Tensor) -> None:
        """Rows of these slots change here, after a copy of them may have left."""
        for out in self._outgoing:
            if out.move.owner == owner and self._serves(out.move):
                out.pending[slots] = True

    def before_run(
        self,
        owner: int,
        reads: torch.Tensor,
        writes: torch.Tensor,
        next_packet: Callable[[], Packet | None],
    ) -> None:
        """A micro-batch of `owner` is about to read and write these slots in the layers served.

        Waits for rows on their way; `next_packet` gives the next packet of a transfer, or None
        after a moment. Raises `PeerLost` if rows do not come within the peer timeout.
        """
        self.rewritten(owner, writes)
        deadline = self._clock() + self._timeout
        for incoming in self._incoming.values():
            if incoming.move.owner != owner or not self._serves(incoming.move):
                continue
            incoming.awaited[writes] = False
            while bool(incoming.awaited[reads].any()):
                self.pump(_WAIT_S)
                packet = next_packet()
                if packet is not None:
                    self.store(packet, wire.decode(packet.header))
                elif self._clock() > deadline:
                    raise PeerLost(f"KV of instance {owner} did not arrive")

    def pump(self, seconds: float) -> bool:
        """Send pieces for about so long, at least one, if there is room; false if none went."""
        deadline = self._clock() + seconds
        sent = False
        while self._send_piece(self._piece_bytes + _RESERVED_BYTES):
            sent = True
            if self._clock() >= deadline:
                break
        return sent

    def store(self, packet: Packet, header: wire.Header) -> None:
        """Keep what has arrived; packets that are not about this transfer are ignored."""
        if isinstance(header, wire.LayerParameters):
            self._pieces.receive(header, packet.tensors[0])
        elif isinstance(header, wire.KvRows):
            self._store_rows(header, packet.tensors)

    # -- at a stroke -----------------------------------------------------------------------------

    def send_rest(self, epoch: int, taken: Mapping[int, torch.Tensor]) -> None:
        """Send all rows that are missing of the slots in `taken`; nothing is written any more."""
        self._epoch = epoch
        for out in self._outgoing:
            out.pending &= self._mask(taken[out.move.owner])
            self._send_rows(out, torch.nonzero(out.pending).flatten(), last=True)

    def receive_rest(self, next_packet: Callable[[float], Packet | None], deadline: float) -> None:
        """Send the parameters that are left, and wait for all that is due here.

        `next_packet` gives the next packet of this transfer, or None at a time in monotonic
        seconds. Raises `PeerLost` at `deadline`.
        """
        patience = self._clock() + _PATIENCE_S
        pieces = self._pieces
        while pieces.unsent or pieces.due or not all(i.ended for i in self._incoming.values()):
            # A peer may hold on to what it has received: then some goes without room.
            sent = self._send_piece(self._piece_bytes if self._clock() < patience else 0)
            if sent:
                patience = self._clock() + _PATIENCE_S
            wait = self._clock() + (0.0 if sent else _WAIT_S)
            packet = next_packet(wait if pieces.unsent else deadline)
            if packet is not None:
                self.store(packet, wire.decode(packet.header))
            elif self._clock() > deadline:
                raise PeerLost(f"waited for {self._missing()}")
        pieces.attach()

    # -- inside ----------------------------------------------------------------------------------

    def _send_piece(self, room: int) -> bool:
        """Send one piece to somebody for whom there is `room`; rows before parameters."""
        for out in self._outgoing:
            if self._plane.room(out.move.target) >= room:
                slots = torch.nonzero(out.pending).flatten()
                if len(slots):
                    count = max(1, self._piece_bytes // self._row_bytes(out.move))
                    self._send_rows(out, slots[:count])
                    return True
        return self._pieces.send(self._epoch, room)

    def _send_rows(self, out: _Outgoing, slots: torch.Tensor, *, last: bool = False) -> None:
        if not len(slots) and not last:
            return
        move = out.move
        k, v = self._kv.gather(move.layers, move.owner, slots)
        inline, beside = packing.inlined(slots)
        header = wire.KvRows(
            sender=self._me,
            epoch=self._epoch,
            owner=move.owner,
            layers=move.layers,
            slots=inline,
            last=last,
        )
        self._plane.send(move.target, wire.encode(header), [*beside, k, v])
        out.pending[slots] = False
        self.sent_kv_bytes += k.nbytes + v.nbytes

    def _store_rows(self, header: wire.KvRows, tensors: Sequence[torch.Tensor]) -> None:
        incoming = self._incoming[header.owner, header.layers]
        *beside, k, v = tensors
        slots = packing.integers_of(header.slots, [t.cpu() for t in beside])
        if self._serves(incoming.move):
            # What a micro-batch has written here since is newer than what was on its way.
            fresh = torch.nonzero(incoming.awaited[slots]).flatten()
            if len(fresh) < len(slots):
                slots, there = slots[fresh], fresh.to(k.device, non_blocking=True)
                k, v = k.index_select(1, there), v.index_select(1, there)
        self._kv.scatter(header.layers, header.owner, slots, k, v)
        incoming.awaited[slots] = False
        incoming.ended = header.last

    def _serves(self, move: Move) -> bool:
        """Whether micro-batches run these layers here while the transfer goes on."""
        return len(move.layers.common(self._serving)) > 0

    def _row_bytes(self, move: Move) -> int:
        shape = self._kv.shape
        return len(move.layers) * (shape.key_row_bytes + shape.value_row_bytes)

    def _mask(self, slots: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(self._kv.stride, dtype=torch.bool)
        mask[slots] = True
        return mask

    def _missing(self) -> str:
        rows = [i.move for i in self._incoming.values() if not i.ended]
        return f"layers {self._pieces.due}, KV {rows}; {self._pieces.unsent} pieces not taken"
