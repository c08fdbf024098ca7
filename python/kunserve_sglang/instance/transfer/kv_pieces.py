"""KV rows that change hands, in pieces small enough to let activations pass."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from kunserve_sglang.core.errors import PeerLost
from kunserve_sglang.core.layout import LayerRange, Move
from kunserve_sglang.instance.packets import packing, wire
from kunserve_sglang.instance.store.kv_store import KvStore
from kunserve_sglang.instance.transfer.parameter_pieces import needed
from kunserve_sglang.transport import DataPlane


@dataclass(frozen=True, slots=True)
class _Rows:
    """A packet: its header, and slots (unless they are inline), K and V."""

    header: bytes
    tensors: list[torch.Tensor]


@dataclass(slots=True)
class _Outgoing:
    """`pending`: slots whose rows the target does not have, `asked`: of which a micro-batch has
    need there; bool by slot. `copies`: packets that have to leave, while their rows may not stay.
    `sent`: packets so far, copies included.
    """

    move: Move
    pending: torch.Tensor
    asked: torch.Tensor
    copies: deque[_Rows] = field(default_factory=deque)
    sent: int = 0


@dataclass(slots=True)
class _Incoming:
    """`awaited`: slots whose rows are on their way, bool by slot. `came`: packets so far."""

    move: Move
    awaited: torch.Tensor
    ended: bool = False
    came: int = 0


class KvPieces:
    """One member's side: which rows are left to send, and which arrive here."""

    def __init__(
        self,
        me: int,
        moves: Iterable[Move],
        *,
        taken: Mapping[int, torch.Tensor],
        serving: LayerRange,
        store: KvStore,
        plane: DataPlane,
        piece_bytes: int,
    ) -> None:
        """`taken` are the slots of each owner that have rows to move; `serving` the layers that
        this member runs until all is done.
        """
        self._me = me
        self._serving = serving
        self._store = store
        self._plane = plane
        self._piece_bytes = piece_bytes
        moves = list(moves)
        none = torch.empty(0, dtype=torch.int64)
        self._outgoing = [
            _Outgoing(m, self._mask(taken[m.owner]), self._mask(none))
            for m in moves
            if m.source == me
        ]
        self._asked = False
        self._incoming = {
            (m.owner, m.layers): _Incoming(m, self._mask(taken[m.owner]))
            for m in moves
            if m.target == me
        }
        self.sent_bytes = 0

    @property
    def arriving(self) -> list[Move]:
        """What comes to this member."""
        return [i.move for i in self._incoming.values()]

    @property
    def leaving(self) -> list[Move]:
        """What goes away from here."""
        return [o.move for o in self._outgoing]

    @property
    def leaving_for_good(self) -> list[Move]:
        """Of that, what nobody reads here meanwhile."""
        return [move for move in self.leaving if not self._serves(move)]

    @property
    def unsent(self) -> bool:
        """Rows are left to send."""
        return any(o.copies or bool(o.pending.any()) for o in self._outgoing)

    @property
    def due(self) -> bool:
        """Rows are on their way here."""
        return any(bool(i.awaited.any()) for i in self._incoming.values())

    @property
    def unended(self) -> list[Move]:
        """Moves to this member whose last rows have not come."""
        return [i.move for i in self._incoming.values() if not i.ended]

    # -- leaving ---------------------------------------------------------------------------------

    def take_along(self, epoch: int, slots: torch.Tensor) -> None:
        """Send the rows of these own slots first, and now as far as there is room for them."""
        for out in self._outgoing:
            if out.move.owner == self._me:
                out.asked[slots] = out.pending[slots]
                self._asked = True
        self.send_asked(epoch)

    def send_asked(self, epoch: int) -> None:
        """Send what micro-batches on their way have need of, as far as there is room."""
        if not self._asked:
            return
        self._asked = False
        for out in self._outgoing:
            while len(slots := torch.nonzero(out.asked).flatten()):
                if not self._send_some(epoch, out, slots):
                    self._asked = True
                    break

    def unsent_bytes(self, slots: torch.Tensor) -> int:
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

    def send(self, epoch: int) -> bool:
        """Send a piece to somebody for whom there is room; false if none went."""
        self.send_asked(epoch)
        for out in self._outgoing:
            if out.copies:
                if self._has_room(out.move.target):
                    self._send_packet(out, out.copies.popleft())
                    return True
            elif self._send_some(epoch, out, torch.nonzero(out.pending).flatten()):
                return True
        return False

    def send_rest(self, epoch: int, taken: Mapping[int, torch.Tensor]) -> None:
        """Send all rows that are missing of the slots in `taken`; nothing is written any more.

        For what finds no room there are copies on the host then, which `send` sends.
        """
        for out in self._outgoing:
            out.pending &= self._mask(taken[out.move.owner])
            slots = torch.nonzero(out.pending).flatten()
            parts = torch.split(slots, self._rows_in_piece(out.move))
            for number, part in enumerate(parts, 1):
                rows = self._rows_of(epoch, out, part, last=number == len(parts))
                if not out.copies and self._has_room(out.move.target):
                    self._send_packet(out, rows)
                else:
                    out.copies.append(_Rows(rows.header, [t.cpu() for t in rows.tensors]))

    # -- arriving --------------------------------------------------------------------------------

    def awaited(self, owner: int, reads: torch.Tensor, writes: torch.Tensor) -> Iterator[None]:
        """Yields as long as rows that a micro-batch of `owner` reads here are on their way.

        What it writes is not waited for.
        """
        for incoming in self._incoming.values():
            if incoming.move.owner != owner or not self._serves(incoming.move):
                continue
            incoming.awaited[writes] = False
            while bool(incoming.awaited[reads].any()):
                yield

    def receive(self, header: wire.KvRows, tensors: Sequence[torch.Tensor]) -> None:
        """Keep rows that have arrived; what has been before is ignored.

        Raises `PeerLost` after a gap: nobody could say which rows are missing here.
        """
        incoming = self._incoming.get((header.owner, header.layers))
        if incoming is None or header.number < incoming.came:
            return
        if header.number > incoming.came:
            raise PeerLost(f"KV of instance {header.owner} came with a gap")
        incoming.came += 1
        *beside, k, v = tensors
        slots = packing.integers_of(header.slots, [t.cpu() for t in beside])
        if self._serves(incoming.move):
            # What a micro-batch has written here since is newer than what was on its way.
            fresh = torch.nonzero(incoming.awaited[slots]).flatten()
            if len(fresh) < len(slots):
                slots, there = slots[fresh], fresh.to(k.device, non_blocking=True)
                k, v = k.index_select(1, there), v.index_select(1, there)
        self._store.scatter(header.layers, header.owner, slots, k, v)
        incoming.awaited[slots] = False
        incoming.ended = header.last

    # -- inside ----------------------------------------------------------------------------------

    def _send_some(self, epoch: int, out: _Outgoing, slots: torch.Tensor) -> bool:
        """Send a piece of these rows, if there are any, and room."""
        if not len(slots) or not self._has_room(out.move.target):
            return False
        self._send_packet(out, self._rows_of(epoch, out, slots[: self._rows_in_piece(out.move)]))
        return True

    def _send_packet(self, out: _Outgoing, rows: _Rows) -> None:
        self._plane.send(out.move.target, rows.header, rows.tensors, bulk=True)

    def _rows_of(
        self, epoch: int, out: _Outgoing, slots: torch.Tensor, *, last: bool = False
    ) -> _Rows:
        """A packet of the rows of these slots, which are not pending any more."""
        move = out.move
        k, v = self._store.gather(move.layers, move.owner, slots)
        inline, beside = packing.inlined(slots)
        header = wire.KvRows(
            sender=self._me,
            epoch=epoch,
            owner=move.owner,
            layers=move.layers,
            slots=inline,
            number=out.sent,
            last=last,
        )
        out.sent += 1
        out.pending[slots] = out.asked[slots] = False
        self.sent_bytes += k.nbytes + v.nbytes
        return _Rows(wire.encode(header), [*beside, k, v])

    def _has_room(self, target: int) -> bool:
        return self._plane.room(target) >= needed(self._plane, target, self._piece_bytes)

    def _rows_in_piece(self, move: Move) -> int:
        nbytes = needed(self._plane, move.target, self._piece_bytes)
        return max(1, nbytes // self._row_bytes(move))

    def _serves(self, move: Move) -> bool:
        """Whether micro-batches run these layers here while the transfer goes on."""
        return len(move.layers.common(self._serving)) > 0

    def _row_bytes(self, move: Move) -> int:
        shape = self._store.shape
        return len(move.layers) * (shape.key_row_bytes + shape.value_row_bytes)

    def _mask(self, slots: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(self._store.stride, dtype=torch.bool)
        mask[slots] = True
        return mask
