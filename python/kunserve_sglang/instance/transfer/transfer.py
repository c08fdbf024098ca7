"""KV rows and parameters that change hands because of a transition (paper section 4.3).

A transfer can be carried out at a stroke, while everybody stands still (`send_rest`, then
`receive_rest`), or go on while the members serve:

- After a drop, rows follow their layers. A micro-batch takes the rows that it needs along with it,
  so a request resumes with its own KV and new requests do not wait for anybody's; what no
  micro-batch asks for goes piece by piece. A stage that is asked for rows on their way waits.
  Where there is no room for them yet, they come after the micro-batch that has need of them.
- Before a restore, parameters and rows are fetched ahead. Rows that are written meanwhile are sent
  once more, the last of them at the switch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from kunserve_sglang.core.errors import PeerLost
from kunserve_sglang.core.layout import LayerRange, Move, ParameterLoad
from kunserve_sglang.instance.packets import wire
from kunserve_sglang.instance.store.kv_store import KvStore
from kunserve_sglang.instance.store.parameters import ParameterStore
from kunserve_sglang.instance.transfer.kv_pieces import KvPieces
from kunserve_sglang.instance.transfer.parameter_pieces import ParameterPieces
from kunserve_sglang.transport import DataPlane, Packet

_PIECE_BYTES = 256 << 10
_DEVICE_PIECE_BYTES = 4 << 20
"""Large enough to copy fast, small enough to let activations pass between two.

Beside a GPU a piece costs two kernels a layer and a wait for them, however small it is.
"""

_WAIT_S = 0.001


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
        urgent: bool = False,
    ) -> None:
        """`taken` are the slots of each owner that have rows to move; `serving` the layers that
        this member runs until all is done. If it is `urgent`, somebody waits for its end.
        """
        self._urgent = urgent
        self._epoch = epoch
        self._kv = kv
        self._clock = clock
        self._timeout = timeout_s
        self._moved = clock()
        self._piece_bytes = _PIECE_BYTES if kv.device.type == "cpu" else _DEVICE_PIECE_BYTES
        self._rows = KvPieces(
            me,
            moves,
            taken=taken,
            serving=serving,
            store=kv,
            plane=plane,
            piece_bytes=self._piece_bytes,
        )
        self._pieces = ParameterPieces(
            me, list(loads), store=parameters, plane=plane, piece_bytes=self._piece_bytes
        )

    @property
    def epoch(self) -> int:
        """Under which its packets travel."""
        return self._epoch

    @property
    def sent_kv_bytes(self) -> int:
        """Payload of rows, so far."""
        return self._rows.sent_bytes

    # -- what it is about ------------------------------------------------------------------------

    @property
    def arriving(self) -> list[Move]:
        """KV that comes to this member."""
        return self._rows.arriving

    @property
    def leaving(self) -> list[Move]:
        """KV that goes away from here."""
        return self._rows.leaving

    @property
    def layers(self) -> list[int]:
        """Layers whose parameters come to this member."""
        return self._pieces.layers

    @property
    def complete(self) -> bool:
        """Nothing is left to send, and everything asked for is here."""
        return not (self.unfinished or self._pieces.due or self._rows.due)

    def check_progress(self) -> None:
        """Raises `PeerLost` if nothing has come or gone for the peer timeout."""
        if self._clock() - self._moved > self._timeout:
            raise PeerLost(f"the transfer of epoch {self._epoch} has stopped")

    @property
    def urgent(self) -> bool:
        """Somebody waits for it, or memory for rows to leave; otherwise there is time."""
        return self._urgent or bool(self._rows.leaving_for_good)

    @property
    def unfinished(self) -> bool:
        """There is something to send."""
        return self._pieces.unsent > 0 or self._rows.unsent

    def reserve(self, slots: Callable[[int], int]) -> None:
        """Map memory for what arrives: of an owner's KV, so many slots. Raises `OutOfPages`."""
        self._pieces.reserve()
        for move in self.arriving:
            for layer in move.layers:
                self._kv.resize(layer, move.owner, slots(move.owner))

    def release_left(self) -> None:
        """Give back the memory of rows that have left for good."""
        for move in self._rows.leaving_for_good:
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
        """Send the rows of these own slots first: a micro-batch that reads them leaves next."""
        self._rows.take_along(self._epoch, slots)
        self._moved = self._clock()

    def send_asked(self) -> None:
        """Send of these what found no room before, as far as there is some now."""
        self._rows.send_asked(self._epoch)

    def unsent(self, slots: torch.Tensor) -> int:
        """Bytes that `take_along` would send for these slots."""
        return self._rows.unsent_bytes(slots)

    def rewritten(self, owner: int, slots: torch.Tensor) -> None:
        """Rows of these slots change here, after a copy of them may have left."""
        self._rows.rewritten(owner, slots)

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
        for _ in self._rows.awaited(owner, reads, writes):
            self.pump(_WAIT_S)
            packet = next_packet()
            if packet is not None:
                self.store(packet, wire.decode(packet.header))
            elif self._clock() > deadline:
                raise PeerLost(f"KV of instance {owner} did not arrive")

    def pump(self, seconds: float) -> bool:
        """Send pieces for about so long, at least one, if there is room; false if none went."""
        return self.for_about(seconds, self._send_piece)

    def for_about(self, seconds: float, work: Callable[[], bool]) -> bool:
        """Repeat `work` while it finds something to do, once at least; false if it never did."""
        deadline = self._clock() + seconds
        worked = False
        while work():
            worked = True
            if self._clock() >= deadline:
                break
        return worked

    def store(self, packet: Packet, header: wire.Header) -> None:
        """Keep what has arrived; packets that are not about this transfer are ignored."""
        self._moved = self._clock()
        if isinstance(header, wire.LayerParameters):
            self._pieces.receive(header, packet.tensors[0])
        elif isinstance(header, wire.KvRows):
            self._rows.receive(header, packet.tensors)

    # -- at a stroke -----------------------------------------------------------------------------

    def send_rest(self, epoch: int, taken: Mapping[int, torch.Tensor]) -> None:
        """Send all rows that are missing of the slots in `taken`; nothing is written any more.

        Their pages may go then. What finds no room is copied to the host, beside the memory budget,
        until `receive_rest` ends.
        """
        self._epoch = epoch
        self._rows.send_rest(epoch, taken)

    def receive_rest(self, next_packet: Callable[[float], Packet | None], deadline: float) -> None:
        """Send what is left as there is room for it, and take in all that is due here.

        `next_packet` gives the next packet of this transfer, or None at a time in monotonic
        seconds. Raises `PeerLost` at `deadline`. Everybody takes in while it waits for room, so
        nobody waits for good.
        """
        pieces = self._pieces
        while self.unfinished or pieces.due or self._rows.unended:
            wait = 0.0 if self._send_piece() else _WAIT_S if self.unfinished else float("inf")
            packet = next_packet(min(self._clock() + wait, deadline))
            if packet is not None:
                self.store(packet, wire.decode(packet.header))
            elif self._clock() >= deadline:
                raise PeerLost(f"waited for {self._missing()}")
        pieces.attach()

    # -- inside ----------------------------------------------------------------------------------

    def _send_piece(self) -> bool:
        """Send one piece to somebody for whom there is room; rows before parameters."""
        sent = self._rows.send(self._epoch) or self._pieces.send(self._epoch)
        if sent:
            self._moved = self._clock()
        return sent

    def _missing(self) -> str:
        rows = self._rows.unended
        return f"layers {self._pieces.due}, KV {rows}; {self._pieces.unsent} pieces not taken"
