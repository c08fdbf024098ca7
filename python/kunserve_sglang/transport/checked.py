"""Checksums on packets: what changes hands is what was sent, or the group comes apart."""

from __future__ import annotations

import struct
import zlib

import torch

from kunserve_sglang.core.errors import PeerLost
from kunserve_sglang.transport.data import Packet, Tensors
from kunserve_sglang.transport.forwarding import ForwardingPlane

_SEAL = struct.Struct("<BI")
SEAL_BYTES = _SEAL.size
"""Before every header: whether its packet is bulk, and the checksum."""


class CheckedPlane(ForwardingPlane):
    """A data plane whose peers have to be such as well.

    A checksum is that of the header and of all tensors but activations: these are many, stay in no
    memory, and a checksum of what is on a GPU waits for it.
    """

    def send(self, peer: int, header: bytes, tensors: Tensors = (), *, bulk: bool = False) -> None:
        seal = _SEAL.pack(bulk, _checksum(header, tensors, int(bulk)))
        self._plane.send(peer, seal + header, tensors, bulk=bulk)

    def receive(self, timeout_s: float = 0.0) -> Packet | None:
        """As of any data plane; raises `PeerLost` for a packet that is not what was sent."""
        packet = self._plane.receive(timeout_s)
        if packet is None:
            return None
        header = packet.header[SEAL_BYTES:]
        if len(packet.header) >= SEAL_BYTES:
            bulk, checksum = _SEAL.unpack_from(packet.header)
            if checksum == _checksum(header, packet.tensors, bulk):
                return Packet(header, packet.tensors)
        raise PeerLost("a packet has arrived that is not what its checksum says")


def _checksum(header: bytes, tensors: Tensors, bulk: int) -> int:
    checksum = zlib.crc32(header, bulk)
    for tensor in tensors:
        if bulk or not tensor.is_floating_point():
            checksum = zlib.crc32(_bytes_of(tensor), checksum)
    return checksum


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
