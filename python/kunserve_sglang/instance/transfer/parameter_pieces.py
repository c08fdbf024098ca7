"""Decoder parameters that change hands, in pieces small enough to let activations pass."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from kunserve_sglang.core.errors import PeerLost
from kunserve_sglang.core.layout import ParameterLoad
from kunserve_sglang.instance.packets import wire
from kunserve_sglang.instance.store.parameters import ParameterStore
from kunserve_sglang.transport import DataPlane


@dataclass(slots=True)
class _Piece:
    load: ParameterLoad
    offset: int
    data: torch.Tensor


def needed(plane: DataPlane, target: int, piece_bytes: int) -> int:
    """Room to wait for before a piece goes to `target`, and how large it is at most.

    Several find room at once, so that one leaves while another is taken.
    """
    return min(piece_bytes, max(1, plane.window(target) // 4))


class ParameterPieces:
    """One member's side: what is left to send, and the layers that arrive here."""

    def __init__(
        self,
        me: int,
        loads: Sequence[ParameterLoad],
        *,
        store: ParameterStore,
        plane: DataPlane,
        piece_bytes: int,
    ) -> None:
        self._me = me
        self._store = store
        self._plane = plane
        self._piece_bytes = piece_bytes
        self._unsent = deque(self._cut(load for load in loads if load.source == me))
        self._due: dict[int, torch.Tensor] = {}
        self._arrived: Counter[int] = Counter()
        self.layers = [load.layer for load in loads if load.target == me]

    @property
    def unsent(self) -> int:
        """Pieces that are left to send."""
        return len(self._unsent)

    @property
    def due(self) -> list[int]:
        """Layers that are not here completely yet, ascending."""
        return sorted(self._due)

    def reserve(self) -> None:
        """Map memory for the layers that arrive. Raises `OutOfPages`."""
        self._due = {layer: self._store.reserve(layer) for layer in self.layers}

    def cancel(self) -> None:
        """Give that memory back."""
        for layer in self.layers:
            self._store.cancel(layer)

    def send(self, epoch: int) -> bool:
        """Send the next piece, if there is room for it; false if it did not go."""
        if not self._unsent:
            return False
        target = self._unsent[0].load.target
        if self._plane.room(target) < needed(self._plane, target, self._piece_bytes):
            return False
        piece = self._unsent.popleft()
        header = wire.LayerParameters(
            sender=self._me, epoch=epoch, layer=piece.load.layer, offset=piece.offset
        )
        self._plane.send(target, wire.encode(header), [piece.data], bulk=True)
        return True

    def receive(self, header: wire.LayerParameters, data: torch.Tensor) -> None:
        """Keep a piece that has arrived; one of a layer that is not due is ignored.

        So is one that has been before. Raises `PeerLost` after a gap: they come in order, from one
        source, and what is missing is not sent again.
        """
        arrived = self._arrived[header.layer]
        if header.layer not in self._due or header.offset < arrived:
            return
        if header.offset > arrived:
            raise PeerLost(f"parameters of layer {header.layer} came with a gap")
        memory = self._due[header.layer]
        memory[header.offset : header.offset + len(data)] = data
        self._arrived[header.layer] += len(data)
        if self._arrived[header.layer] == len(memory):
            del self._due[header.layer]

    def attach(self) -> None:
        """All layers are complete: let the model use them."""
        for layer in self.layers:
            self._store.attach(layer)

    def _cut(self, loads: Iterable[ParameterLoad]) -> Iterator[_Piece]:
        for load in loads:
            data = self._store.bytes_of(load.layer)
            size = needed(self._plane, load.target, self._piece_bytes)
            for offset in range(0, len(data), size):
                yield _Piece(load, offset, data[offset : offset + size])
