"""Packets in shared memory: overflow, whose memory it is, peers that are lost."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from kunserve_sglang.core.errors import InternalError, PeerLost
from kunserve_sglang.memory.cuda_driver import CudaDevice
from kunserve_sglang.transport import plane as plane_module
from kunserve_sglang.transport.cuda_ring import CudaRings
from kunserve_sglang.transport.local import LocalDataPlane
from kunserve_sglang.transport.ring import HostRings, Rings
from tests.support.fake_cuda import FakeCuda
from tests.support.packets import WAIT_S, received


def test_rings_lie_where_the_tensors_do() -> None:
    assert plane_module.rings_on(torch.device("cpu")).kind == b"host"
    assert plane_module.rings_on(torch.device("cuda", 1)).kind == b"cuda"


@pytest.fixture(params=["host", "gpu"])
def rings(request: pytest.FixtureRequest) -> Iterator[Rings]:
    """Where packets of one host may lie; a GPU is a fake one, and must get everything back."""
    if request.param == "host":
        yield HostRings()
        return
    fakes: list[FakeCuda] = []

    def open_gpu() -> CudaDevice:
        fakes.append(FakeCuda(granularity=4096))
        return CudaDevice(0, fakes[-1])

    yield CudaRings(open_gpu, torch.device("cpu"))
    assert fakes
    assert all(fake.clean for fake in fakes)


@pytest.fixture(params=[True, False], ids=["tail in memory", "tail by socket"])
def pair(
    request: pytest.FixtureRequest, tmp_path: Path, rings: Rings
) -> Iterator[tuple[LocalDataPlane, LocalDataPlane]]:
    planes = [
        LocalDataPlane(
            str(tmp_path / name), ring_bytes=64 << 10, rings=rings, shares_tail=request.param
        )
        for name in "ab"
    ]
    planes[0].connect({1: planes[1].address})
    yield planes[0], planes[1]
    for plane in planes:
        plane.close()


def test_both_ends_agree_on_whose_memory_it_is(tmp_path: Path) -> None:
    gpu = CudaRings(partial(CudaDevice, 0, FakeCuda(granularity=4096)), torch.device("cpu"))
    a, b = LocalDataPlane(str(tmp_path / "a"), rings=gpu), LocalDataPlane(str(tmp_path / "b"))
    a.connect({1: b.address})
    with pytest.raises(InternalError, match="b'cuda' ring"):
        b.receive(WAIT_S)
    a.close()
    b.close()


def test_without_memory_for_a_ring_a_peer_cannot_be_reached(tmp_path: Path) -> None:
    """So the member votes against a drop, where it would otherwise end in the middle of it."""
    fake = FakeCuda(granularity=4096, memory=16 << 10)
    gpu = CudaRings(partial(CudaDevice, 0, fake), torch.device("cpu"))
    a, b = LocalDataPlane(str(tmp_path / "a"), rings=gpu), LocalDataPlane(str(tmp_path / "b"))
    with pytest.raises(PeerLost, match=r"no ring to a peer: .* --memory-budget"):
        a.connect({1: b.address})
    assert fake.clean
    a.close()
    b.close()


def test_more_than_the_ring_holds(pair: tuple[LocalDataPlane, LocalDataPlane]) -> None:
    """Large tensors, and many that nobody has taken yet, and the socket full of notes."""
    a, b = pair
    large = torch.arange(100_000)
    for number in range(2000):
        a.send(1, str(number).encode(), [large if number % 500 == 0 else torch.full((99,), number)])
    for number in range(2000):
        a.receive()  # lets the sender's waiting messages out
        packet = received(b)
        assert packet.header == str(number).encode()
        expected = large if number % 500 == 0 else torch.full((99,), number)
        assert torch.equal(packet.tensors[0], expected)


def test_room_is_what_fits_the_ring(pair: tuple[LocalDataPlane, LocalDataPlane]) -> None:
    a, b = pair
    assert a.room(1) == 64 << 10
    for _ in range(200):
        size = max(64, a.room(1) // 3)
        outbox = a._outboxes[1]
        assert size <= outbox.room
        a.send(1, b"", [torch.zeros(size, dtype=torch.uint8)])
        if a.room(1) < 10_000:
            while b.receive() is not None:
                continue
    while b.receive() is not None:
        continue
    assert a.room(1) == 64 << 10


def test_the_ring_is_reused_in_any_order_of_release(
    pair: tuple[LocalDataPlane, LocalDataPlane],
) -> None:
    a, b = pair
    kept: list[torch.Tensor] = []
    for number in range(300):
        a.send(1, b"", [torch.full((1000,), number)])
        kept.append(received(b).tensors[0])
        if number % 3 == 0:
            kept.pop(len(kept) // 2)
        if len(kept) > 5:
            kept.pop(0)
        assert all(int(t[0]) == int(t[-1]) for t in kept)
    kept.clear()
    gc.collect()
    # Everything is free again: a tensor as large as the ring fits, with no file of its own.
    assert b.receive() is None  # tells the sender, if it is to be told
    assert a.room(1) == 64 << 10
    assert a._outboxes[1]._ring.write([torch.zeros(60 << 10, dtype=torch.uint8)]) is not None


def test_a_lost_peer_is_noticed_by_whoever_sends(
    pair: tuple[LocalDataPlane, LocalDataPlane],
) -> None:
    a, b = pair
    a.send(1, b"hello")
    received(b)
    b.close()
    with pytest.raises(PeerLost):
        a.send(1, b"anybody?")
    with pytest.raises(PeerLost):
        a.connect({2: b.address})


def test_a_lost_sender_is_no_event_for_the_receiver(
    pair: tuple[LocalDataPlane, LocalDataPlane],
) -> None:
    a, b = pair
    a.send(1, b"last words", [torch.ones(3)])
    a.close()
    assert torch.equal(received(b).tensors[0], torch.ones(3))
    assert b.receive() is None
