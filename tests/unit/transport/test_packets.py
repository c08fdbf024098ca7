"""Packets between instances: order, ownership, overflow, lost peers; both ways to a peer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import msgspec
import pytest
import torch
import zmq

from kunserve_sglang.core.errors import InternalError, PeerLost
from kunserve_sglang.core.keys import MemberKeys, new_keys
from kunserve_sglang.core.transports import Transport
from kunserve_sglang.memory.cuda_driver import CudaDevice
from kunserve_sglang.transport import DataPlane, HostAwareDataPlane
from kunserve_sglang.transport import plane as plane_module
from kunserve_sglang.transport.cuda_ring import CudaRings
from kunserve_sglang.transport.local import LocalDataPlane
from tests.support.fake_cuda import FakeCuda
from tests.support.packets import received

MakePlane = Callable[[str], DataPlane]


@pytest.fixture(params=["shared memory", "tcp", "gpu", "lanes"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakePlane]:
    """Makes planes that reach each other in one way, by host names alike or not."""
    keys = new_keys().members
    made: list[DataPlane] = []

    def build(name: str) -> DataPlane:
        plane: DataPlane
        if request.param == "gpu":
            fake = partial(CudaDevice, 0, FakeCuda())
            plane = LocalDataPlane(str(tmp_path / name), rings=CudaRings(fake, torch.device("cpu")))
        elif request.param == "lanes":
            plane = HostAwareDataPlane(str(tmp_path / name), transport=Transport.NCCL)
        elif request.param == "tcp":
            plane = HostAwareDataPlane(
                str(tmp_path / name), tcp="tcp://127.0.0.1:*", keys=keys, host=name
            )
        else:
            plane = HostAwareDataPlane(str(tmp_path / name))
        made.append(plane)
        return plane

    yield build
    for plane in made:
        plane.close()


def test_packets_arrive_whole_and_in_order(make: MakePlane) -> None:
    a, b = make("a"), make("b")
    a.connect({1: b.address})
    sent = [
        torch.arange(12, dtype=torch.int64).view(3, 4),
        torch.randn(5, 2).to(torch.bfloat16).t(),  # not contiguous
        torch.empty(0, 7),
        torch.tensor(3.5),
    ]
    for number in range(50):
        a.send(1, str(number).encode(), [t + number if t.numel() else t for t in sent])
    for number in range(50):
        packet = received(b)
        assert packet.header == str(number).encode()
        assert all(
            torch.equal(t, s + number if s.numel() else s) and t.dtype == s.dtype
            for t, s in zip(packet.tensors, sent, strict=True)
        )
    assert b.receive() is None


def test_what_was_received_may_be_kept_and_changed(make: MakePlane) -> None:
    a, b = make("a"), make("b")
    a.connect({1: b.address})
    a.send(1, b"first", [torch.ones(1000)])
    kept = received(b).tensors[0]
    kept.mul_(2)
    for _ in range(100):
        a.send(1, b"more", [torch.zeros(100_000)])
        received(b)
    assert torch.equal(kept, torch.full((1000,), 2.0))


def test_what_was_sent_may_change_at_once(make: MakePlane) -> None:
    """A transition unmaps what it has just sent."""
    a, b = make("a"), make("b")
    a.connect({1: b.address})
    sent = torch.ones(500_000)
    for _ in range(20):
        a.send(1, b"", [sent])
        sent.add_(1)
    for number in range(20):
        assert torch.equal(received(b).tensors[0], torch.full((500_000,), 1.0 + number))


def test_two_peers_talk_at_once(make: MakePlane) -> None:
    planes = [make(name) for name in "abc"]
    for number, plane in enumerate(planes):
        plane.connect({n: p.address for n, p in enumerate(planes) if n != number})
    for number in (1, 2):
        for k in range(20):
            planes[number].send(0, f"{number} {k}".encode(), [torch.tensor([k])])
    headers = [received(planes[0]).header.decode().split() for _ in range(40)]
    for number in "12":
        assert [int(k) for n, k in headers if n == number] == list(range(20))
    planes[0].send(2, b"back")
    assert received(planes[2]).header == b"back"


def test_an_unknown_peer_is_a_bug(make: MakePlane) -> None:
    a, b = make("a"), make("b")
    a.connect({1: b.address})
    a.connect({})
    with pytest.raises(InternalError):
        a.send(1, b"x")


def test_a_distant_peer_needs_tcp(tmp_path: Path) -> None:
    near = HostAwareDataPlane(str(tmp_path / "near"))
    far = HostAwareDataPlane(str(tmp_path / "far"), host="another")
    with pytest.raises(PeerLost):
        near.connect({1: far.address})
    near.close()
    far.close()


def test_memory_is_shared_on_one_gpu_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Instances of one host on two GPUs, or with and without one, need TCP."""
    gpus = {torch.device("cuda", n): f"GPU-{n}" for n in range(2)}
    monkeypatch.setattr(plane_module, "gpu_of", lambda device: gpus.get(device, ""))
    monkeypatch.setattr(
        plane_module,
        "rings_on",
        lambda _: CudaRings(partial(CudaDevice, 0, FakeCuda()), torch.device("cpu")),
    )
    devices = [*gpus, torch.device("cuda", 0), torch.device("cpu")]
    planes = [
        HostAwareDataPlane(str(tmp_path / str(n)), device=device, transport=Transport.CUDA_IPC)
        for n, device in enumerate(devices)
    ]
    planes[0].connect({2: planes[2].address})
    planes[0].send(2, b"hello", [torch.ones(3)])
    assert torch.equal(received(planes[2]).tensors[0], torch.ones(3))
    for other in (1, 3):
        with pytest.raises(PeerLost, match="cannot be reached with --transport cuda-ipc"):
            planes[0].connect({other: planes[other].address})
    for plane in planes:
        plane.close()


def test_packets_pass_over_ipv6(tmp_path: Path) -> None:
    keys = new_keys().members
    a, b = (
        HostAwareDataPlane(str(tmp_path / name), tcp="tcp://[::1]:*", keys=keys, host=name)
        for name in "ab"
    )
    try:
        b.connect({0: a.address})
        b.send(0, b"from another host")
        assert received(a).header == b"from another host"
    finally:
        a.close()
        b.close()


@pytest.mark.parametrize("stranger", ["without keys", "with keys of its own", "with half of them"])
def test_strangers_are_turned_away(tmp_path: Path, stranger: str) -> None:
    """Who knows where a plane listens, and even the key that it shows, cannot send to it."""
    keys = new_keys().members
    plane = HostAwareDataPlane(str(tmp_path / "a"), tcp="tcp://127.0.0.1:*", keys=keys, host="a")
    friend = HostAwareDataPlane(str(tmp_path / "b"), tcp="tcp://127.0.0.1:*", keys=keys, host="b")
    address = msgspec.json.decode(plane.address)["tcp"]
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.PUSH)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.IMMEDIATE, 1)  # nothing is queued for a connection that is not there
    socket.setsockopt(zmq.SNDTIMEO, 500)
    own = new_keys().members
    if stranger == "with keys of its own":
        own.secure_outbox(socket)
    elif stranger == "with half of them":
        MemberKeys(router="", public=own.public, secret=own.secret).secure_outbox(socket)
        socket.curve_serverkey = keys.public.encode()
    socket.connect(address)
    try:
        with pytest.raises(zmq.Again):
            socket.send_multipart([b"header", b"\x90"])
        friend.connect({0: plane.address})
        friend.send(0, b"a member's")
        assert received(plane).header == b"a member's"
        assert plane.receive(0.2) is None
    finally:
        socket.close()
        context.term()
        plane.close()
        friend.close()
