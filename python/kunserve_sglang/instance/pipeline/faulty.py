"""Packets that get lost or spoilt on purpose, on their way out of an instance or into it."""

from __future__ import annotations

import torch

from kunserve_sglang.core import faults
from kunserve_sglang.core.fault_points import FaultKind
from kunserve_sglang.instance.packets import wire
from kunserve_sglang.transport import DataPlane, Packet, Tensors
from kunserve_sglang.transport.data import Malformed
from kunserve_sglang.transport.forwarding import ForwardingPlane

_NAMES: dict[type[wire.Header], str] = {
    wire.TakenSlots: "barrier",
    wire.KvRows: "exchange",
    wire.LayerParameters: "parameters",
    wire.MicroBatch: "pipeline",
}


class FaultyPlane(ForwardingPlane):
    """A data plane with the points of `core/fault_points.py`; for processes in which there are
    faults, below whatever checks what arrives."""

    def __init__(self, plane: DataPlane, *, me: int, seal_bytes: int) -> None:
        """Of instance `me`; before every header stand `seal_bytes` that are none of it."""
        super().__init__(plane)
        self._me = me
        self._seal_bytes = seal_bytes

    def send(self, peer: int, header: bytes, tensors: Tensors = (), *, bulk: bool = False) -> None:
        meaning = wire.decode(header[self._seal_bytes :])
        if isinstance(meaning, wire.MicroBatch) and meaning.owner != self._me:
            faults.at("pipeline.computed")
        loss = faults.at(f"{_NAMES[type(meaning)]}.sent")
        if loss is FaultKind.DROP:
            return
        if loss is FaultKind.CORRUPT:
            tensors = _spoilt(tensors)
        super().send(peer, header, tensors, bulk=bulk)

    def receive(self, timeout_s: float = 0.0) -> Packet | None:
        while (packet := super().receive(timeout_s)) is not None:
            loss = self._loss_of(packet.header[self._seal_bytes :])
            if loss is FaultKind.CORRUPT:
                return Packet(packet.header, _spoilt(packet.tensors))
            if loss is None:
                return packet
            timeout_s = 0.0
        return None

    def _loss_of(self, header: bytes) -> FaultKind | None:
        try:
            return faults.at(f"{_NAMES[type(wire.decode(header))]}.received")
        except Malformed:
            return None  # somebody above looks at it


def _spoilt(tensors: Tensors) -> list[torch.Tensor]:
    """Copies, with one bit flipped in the middle: in a float's exponent, so that it matters."""
    spoilt = [t.clone(memory_format=torch.contiguous_format) for t in tensors]
    for tensor in reversed(spoilt):
        if tensor.numel():
            number = tensor.view(-1)[tensor.numel() // 2 :].view(torch.uint8)
            number[tensor.itemsize - 1] ^= 0x40
            break
    return spoilt
