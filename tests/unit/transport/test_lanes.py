"""Lanes between two processes: what passes, what waits, and what is lost with a peer.

Without GPUs they run over gloo; `tests/gpu` has the same over NCCL.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from kunserve_sglang.core.errors import PeerLost
from kunserve_sglang.core.keys import MemberKeys, new_keys
from kunserve_sglang.core.transports import Transport
from kunserve_sglang.transport import HostAwareDataPlane, Packet, lane, nccl
from tests.support.limits import many_open_files

WAIT_S = 30.0


@pytest.fixture(params=["one host", "another host"])
def keys(request: pytest.FixtureRequest) -> MemberKeys | None:
    """Members that listen to other hosts show keys where they hear of packets."""
    return new_keys().members if request.param == "another host" else None


def plane(folder: Path, name: str, keys: MemberKeys | None) -> HostAwareDataPlane:
    return HostAwareDataPlane(
        str(folder / name),
        tcp="tcp://127.0.0.1:*" if keys else "",
        keys=keys,
        host=name if keys else "",
        transport=Transport.NCCL,
    )


def echo(folder: Path, keys: MemberKeys | None, peer: str) -> None:
    """A process that sends back what it gets, one larger."""
    there = plane(folder, "there", keys)
    there.connect({0: peer})
    there.send(0, there.address.encode())
    while (packet := there.receive(WAIT_S)) is not None and packet.header != b"end":
        there.send(0, packet.header, [t + 1 for t in packet.tensors])
    there.close()


def received(here: HostAwareDataPlane) -> Packet:
    packet = here.receive(WAIT_S)
    assert packet is not None
    return packet


def send_in_vain(here: HostAwareDataPlane) -> None:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        here.send(1, b"anybody?", [torch.zeros(100_000)])
        here.receive(0.01)


@pytest.fixture
def here(tmp_path: Path, keys: MemberKeys | None) -> Iterator[HostAwareDataPlane]:
    here = plane(tmp_path, "here", keys)
    yield here
    here.close()


@pytest.fixture
def other(
    here: HostAwareDataPlane, tmp_path: Path, keys: MemberKeys | None
) -> Iterator[mp.process.BaseProcess]:
    """The process that echoes; `here` is connected to it."""
    other = mp.get_context("spawn").Process(target=echo, args=(tmp_path, keys, here.address))
    other.start()
    here.connect({1: received(here).header.decode()})
    yield other
    other.kill()
    other.join()


@pytest.mark.timeout(120)
def test_packets_pass_in_both_directions_at_once(
    here: HostAwareDataPlane, other: mp.process.BaseProcess
) -> None:
    """More than there is room for on the device, so that some waits in host memory."""
    sizes = [0, 1, 999, 4 * nccl.ROOM_BYTES // 8, 17, nccl.ROOM_BYTES // 4]
    for number, size in enumerate(sizes * 2):
        here.send(1, str(number).encode(), [torch.full((size,), number), torch.tensor(0.5)])
    here.send(1, b"end")
    for number, size in enumerate(sizes * 2):
        packet = received(here)
        assert packet.header == str(number).encode()
        whole, fraction = packet.tensors
        assert torch.equal(whole, torch.full((size,), number + 1))
        assert fraction.item() == 1.5
    other.join(WAIT_S)
    assert other.exitcode == 0


@pytest.mark.timeout(120)
def test_who_sends_finds_out_that_a_peer_is_gone(
    here: HostAwareDataPlane, other: mp.process.BaseProcess
) -> None:
    here.send(1, b"hello", [torch.zeros(3)])
    assert received(here).header == b"hello"
    address = here._nccl._outboxes[1].address if here._nccl else ""
    other.kill()
    other.join()
    with pytest.raises(PeerLost):
        send_in_vain(here)
    assert here._nccl is not None
    with pytest.raises(PeerLost, match="no instance answers"):
        here._nccl.connect({2: address})


def test_room_is_what_has_not_passed_yet(tmp_path: Path) -> None:
    a, b = plane(tmp_path, "a", None), plane(tmp_path, "b", None)
    a.connect({1: b.address})
    assert a.room(1) == nccl.ROOM_BYTES
    a.send(1, b"", [torch.zeros(3 * nccl.ROOM_BYTES, dtype=torch.uint8)])
    assert received(b).tensors[0].nbytes == 3 * nccl.ROOM_BYTES
    deadline = time.monotonic() + WAIT_S
    while a.room(1) < nccl.ROOM_BYTES:
        assert time.monotonic() < deadline
        b.receive(0.01)
    a.close()
    b.close()


@pytest.fixture
def many_files() -> Iterator[None]:
    """More open files than `select` can tell apart."""
    with many_open_files(), ExitStack() as files:
        for _ in range(1100):
            files.callback(os.close, os.open(os.devnull, os.O_RDONLY))
        yield


@pytest.mark.usefixtures("many_files")
def test_an_instance_may_have_many_files_open(tmp_path: Path) -> None:
    a, b = plane(tmp_path, "a", None), plane(tmp_path, "b", None)
    a.connect({1: b.address})
    a.send(1, b"hello", [torch.ones(2)])
    assert received(b).tensors[0].sum() == 2
    assert b.receive(0.0) is None
    a.close()
    b.close()


def test_a_packet_that_has_not_been_counted_yet_is_not_there(tmp_path: Path) -> None:
    """The thread that takes packets in is between the two."""
    here = plane(tmp_path, "here", None)
    assert here._nccl is not None
    inbox = here._nccl._inbox
    inbox._packets.append(nccl._ArrivedPacket(b"soon", (), torch.empty(0, dtype=torch.uint8)))
    assert here.receive() is None
    os.eventfd_write(inbox.arrived, 1)
    assert received(here).header == b"soon"
    here.close()


class Computing:
    """A CUDA event that happens when it has been asked for a while; nothing passes before."""

    def __init__(self, told: list[str]) -> None:
        self._told = told
        self._asked = 0

    def query(self) -> bool:
        self._asked += 1
        if self._asked == 3:
            self._told.append("computed")
        return self._asked >= 3


class Listener:
    """Stands in for both ends' socket and lane, and notes what it is given."""

    def __init__(self, told: list[str]) -> None:
        self._told = told

    def send(self, what: bytes | torch.Tensor) -> None:
        self._told.append("news" if isinstance(what, bytes) else "bytes")


def test_nothing_is_announced_before_it_is_there(tmp_path: Path) -> None:
    """Or a kernel of the receiver would wait for the sender's scheduler (see `transport.nccl`)."""
    told: list[str] = []
    a, b = plane(tmp_path, "a", None), plane(tmp_path, "b", None)
    a.connect({1: b.address})
    assert a._nccl is not None
    outbox = a._nccl._outboxes[1]
    leaving = nccl._Leaving(b"", (), torch.zeros(1, dtype=torch.uint8), cast(Any, Computing(told)))
    outbox._queued_bytes += 1
    outbox._pass_on(leaving, "", cast(Any, Listener(told)), cast(Any, Listener(told)))
    assert told == ["computed", "news", "bytes"]
    assert a.room(1) == nccl.ROOM_BYTES
    a.close()
    b.close()


def test_without_memory_for_a_packet_only_its_lane_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where activations have taken the last of a GPU; other senders are heard."""

    def no_memory(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(lane, "_TIMEOUT_S", 3.0)
    a, b, c = (plane(tmp_path, name, None) for name in "abc")
    a.connect({1: b.address})
    a.send(1, b"first", [torch.zeros(3)])
    assert received(b).header == b"first"
    with monkeypatch.context() as patch:
        patch.setattr(nccl.Lane, "new_memory", no_memory)
        with pytest.raises(PeerLost):
            send_in_vain(a)
    c.connect({1: b.address})
    c.send(1, b"other", [torch.zeros(3)])
    assert received(b).header == b"other"
    for each in (a, b, c):
        each.close()
