"""Checksums on packets: one that is not what was sent is a lost peer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kunserve_sglang.core.errors import PeerLost
from kunserve_sglang.transport import DataPlane, Packet, Tensors
from kunserve_sglang.transport.checked import CheckedPlane
from kunserve_sglang.transport.forwarding import ForwardingPlane
from kunserve_sglang.transport.local import LocalDataPlane

HEADER = b"what it is"
TENSORS = [
    torch.arange(12, dtype=torch.int64).view(3, 4),
    torch.randn(5, 2).to(torch.bfloat16).t(),
    torch.tensor([True, False]),
    torch.tensor(3.0),
    torch.empty(0, 7),
]


class Spoiling(ForwardingPlane):
    """Changes packets on their way in."""

    def __init__(self, plane: DataPlane) -> None:
        super().__init__(plane)
        self.header_byte: int | None = None
        self.tensor: int | None = None

    def receive(self, timeout_s: float = 0.0) -> Packet | None:
        packet = super().receive(timeout_s)
        if packet is None:
            return None
        header = bytearray(packet.header)
        if self.header_byte is not None:
            header[self.header_byte] ^= 4
        if self.tensor is not None:
            spoilt = packet.tensors[self.tensor].contiguous()
            spoilt.view(-1).view(torch.uint8)[-1] ^= 1
            packet.tensors[self.tensor] = spoilt
        return Packet(bytes(header), packet.tensors)


class Pair:
    def __init__(self, folder: Path) -> None:
        self.ends = [LocalDataPlane(f"{folder}/{number}") for number in range(2)]
        self.sender = CheckedPlane(self.ends[0])
        self.spoiling = Spoiling(self.ends[1])
        self.receiver = CheckedPlane(self.spoiling)
        self.sender.connect({1: self.receiver.address})

    def passes(self, tensors: Tensors, *, bulk: bool = False) -> Packet:
        self.sender.send(1, HEADER, tensors, bulk=bulk)
        packet = self.receiver.receive(5.0)
        assert packet is not None
        return packet


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    made = Pair(tmp_path)
    yield made
    for end in made.ends:
        end.close()


@pytest.mark.parametrize("bulk", [False, True])
def test_a_packet_comes_as_it_was_sent(pair: Pair, bulk: bool) -> None:
    packet = pair.passes(TENSORS, bulk=bulk)
    assert packet.header == HEADER
    assert all(map(torch.equal, packet.tensors, TENSORS))


@pytest.mark.parametrize("byte", range(len(HEADER) + 5))
def test_a_bit_of_a_header_is_noticed(pair: Pair, byte: int) -> None:
    pair.spoiling.header_byte = byte
    with pytest.raises(PeerLost, match="not what its checksum says"):
        pair.passes(TENSORS, bulk=True)


@pytest.mark.parametrize("tensor", range(4))
def test_a_bit_of_what_changes_hands_is_noticed(pair: Pair, tensor: int) -> None:
    pair.spoiling.tensor = tensor
    with pytest.raises(PeerLost, match="not what its checksum says"):
        pair.passes(TENSORS, bulk=True)


def test_activations_are_not_looked_at(pair: Pair) -> None:
    pair.spoiling.tensor = 1
    pair.passes(TENSORS)
    pair.spoiling.tensor = 0
    with pytest.raises(PeerLost):
        pair.passes(TENSORS)


def test_a_packet_without_a_checksum_is_noticed(pair: Pair) -> None:
    pair.ends[0].send(1, b"?")
    with pytest.raises(PeerLost):
        pair.receiver.receive(5.0)
