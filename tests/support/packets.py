"""Packets that a test waits for."""

from __future__ import annotations

from kunserve_sglang.transport import DataPlane, Packet

WAIT_S = 10.0


def received(plane: DataPlane) -> Packet:
    packet = plane.receive(WAIT_S)
    assert packet is not None
    return packet
