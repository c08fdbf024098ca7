"""The data planes of an instance's ranks: packets come in one order on all of them, or to none."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest
import torch
import zmq

from kunserve_sglang.core.errors import PeerLost
from kunserve_sglang.instance.packets import wire
from kunserve_sglang.instance.ranks.ranked import ranked_plane
from kunserve_sglang.instance.ranks.ranks import open_ranks
from kunserve_sglang.transport import DataPlane, Packet
from kunserve_sglang.transport.local import LocalDataPlane
from tests.support.ranks import WAIT_S, together
from tests.support.waiting import until

T = TypeVar("T")


class Instance:
    """Two ranks with a data plane each."""

    def __init__(self, folder: Path, number: int) -> None:
        self.raw = [LocalDataPlane(f"{folder}/{number}-{rank}") for rank in range(2)]
        self.ranks = [open_ranks(f"{folder}/{number}", rank, 2) for rank in range(2)]
        for rank in self.ranks:
            rank.connect()
        self.planes = together(self.ranks, lambda r: ranked_plane(self.raw[r.rank], r))

    def run(self, program: Callable[[DataPlane, int], T]) -> list[T]:
        return together(self.ranks, lambda r: program(self.planes[r.rank], r.rank))

    def close(self) -> None:
        for part in (*self.planes, *self.ranks):
            part.close()


@pytest.fixture
def instances(tmp_path: Path) -> Iterator[list[Instance]]:
    """0 and 1 can send to 2."""
    made = [Instance(tmp_path, number) for number in range(3)]
    for sender in made[:2]:
        sender.run(lambda plane, _: plane.connect({2: made[2].planes[0].address}))
    yield made
    for instance in made:
        instance.close()


def header(sender: int, number: int, epoch: int = 1) -> bytes:
    return wire.encode(wire.LayerParameters(sender=sender, epoch=epoch, layer=number, offset=0))


def described(packet: Packet | None) -> tuple[bytes, float] | None:
    return None if packet is None else (packet.header, float(packet.tensors[0]))


@pytest.mark.parametrize("seed", range(5))
def test_packets_come_in_one_order_on_all_ranks(instances: list[Instance], seed: int) -> None:
    """Whichever part came first where; each rank gets its own part, and each sender's order."""
    rng = random.Random(seed)
    packets = 40
    turns = [(sender, rank) for sender in range(2) for rank in range(2)] * packets
    rng.shuffle(turns)
    numbers = dict.fromkeys(turns, 0)

    def send() -> None:
        for sender, rank in turns:
            number = numbers[sender, rank]
            numbers[sender, rank] += 1
            # Of three packets in a row one has the header of its predecessor.
            name = header(sender, number - (number % 3 == 2))
            instances[sender].raw[rank].send(2, name, [torch.tensor(100.0 * rank + number)])
            instances[sender].raw[rank].receive()  # lets out what the socket did not take

    def receive(plane: DataPlane, _: int) -> list[tuple[bytes, float]]:
        got = []
        while len(got) < 2 * packets:
            if (packet := plane.receive(rng.choice((0.0, 0.01)))) is not None:
                got.append((packet.header, float(packet.tensors[0])))
        return got

    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(send)
        first, second = instances[2].run(receive)
        sending.result(WAIT_S)
    assert [(name, value + 100) for name, value in first] == second
    for sender in range(2):
        mine = [value for name, value in first if wire.decode(name).sender == sender]
        assert mine == list(range(packets))


def test_a_packet_is_not_there_before_all_its_parts_are(instances: list[Instance]) -> None:
    for number, part in enumerate((0, 1)):
        instances[0].raw[part].send(2, header(0, number), [torch.tensor(1.0)])
        instances[0].raw[1 - part].receive()
        assert instances[2].run(lambda plane, _: plane.receive(0.05)) == [None, None]
        instances[0].raw[1 - part].send(2, header(0, number), [torch.tensor(2.0)])
        got = instances[2].run(lambda plane, _: described(plane.receive(WAIT_S)))
        assert sorted(got) == [(header(0, number), 1.0), (header(0, number), 2.0)]  # type: ignore[type-var]


def test_room_is_that_of_rank_0(instances: list[Instance]) -> None:
    instances[0].raw[1].send(2, header(0, 0), [torch.zeros(1 << 20)])
    rooms = instances[0].run(lambda plane, _: plane.room(2))
    assert rooms == [instances[0].raw[0].room(2)] * 2
    assert instances[0].raw[1].room(2) < rooms[0]


def test_a_peer_that_is_lost_to_one_rank_is_lost_to_all(instances: list[Instance]) -> None:
    """It is raised where all ranks can hear of it."""
    instances[2].raw[0].close()

    def program(plane: DataPlane, _: int) -> None:
        plane.send(2, header(0, 0), [torch.tensor(1.0)])
        with pytest.raises(PeerLost, match="has gone"):
            plane.receive()
        assert plane.receive() is None

    instances[0].run(program)


def is_readable(plane: LocalDataPlane) -> bool:
    poller = zmq.Poller()
    for handle in plane.poll_handles():
        poller.register(handle, zmq.POLLIN)
    return bool(poller.poll(0))


def spoil_the_first(plane: LocalDataPlane, monkeypatch: pytest.MonkeyPatch) -> None:
    """A packet that is not what was sent: `CheckedPlane` has taken it, and says so."""
    receive = plane.receive
    first = [True]

    def checked(timeout_s: float = 0.0) -> Packet | None:
        packet = receive(timeout_s)
        if packet is not None and first:
            first.clear()
            raise PeerLost("not what was sent")
        return packet

    monkeypatch.setattr(plane, "receive", checked)


def test_a_packet_that_is_spoilt_is_heard_of_by_all(
    instances: list[Instance], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_the_first(instances[2].raw[0], monkeypatch)
    for part in range(2):
        instances[0].raw[part].send(2, header(0, 0), [torch.tensor(1.0)])
    # It is there when the wait begins, so that nothing comes any more which would end it.
    until(lambda: is_readable(instances[2].raw[0]), WAIT_S, poll_s=0.001)

    def program(plane: DataPlane, _: int) -> None:
        with pytest.raises(PeerLost, match="not what was sent"):
            plane.receive(WAIT_S)

    instances[2].run(program)


def test_one_that_is_spoilt_elsewhere_leaves_a_gap_for_all(
    instances: list[Instance], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 hears nothing of it: what comes next shows to all alike that something is missing."""
    spoil_the_first(instances[2].raw[1], monkeypatch)
    for number, part in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        instances[0].raw[part].send(2, header(0, number), [torch.tensor(1.0)])
    got = instances[2].run(lambda plane, _: described(plane.receive(WAIT_S)))
    assert got == [(header(0, 1), 1.0)] * 2


@pytest.mark.parametrize("rank", [0, 1])
def test_no_rank_connects_where_one_cannot(instances: list[Instance], rank: int) -> None:
    instances[1].raw[rank].close()
    address = instances[1].planes[0].address

    def program(plane: DataPlane, _: int) -> None:
        with pytest.raises(PeerLost, match="no instance answers"):
            plane.connect({1: address})

    instances[0].run(program)


def test_what_one_rank_got_from_a_lost_group_is_forgotten(instances: list[Instance]) -> None:
    """A sender died between two parts: the memory of the first is given back."""
    for part in range(2):
        instances[0].raw[part].send(2, header(0, 0, epoch=5), [torch.tensor(1.0)])
    for part in range(2):
        instances[part].raw[part].send(2, header(part, 1, epoch=5), [torch.zeros(1 << 20)])
    for wanted in (header(0, 0, epoch=5), None):
        wait_s = WAIT_S if wanted else 0.05
        got = instances[2].run(lambda plane, _: described(plane.receive(wait_s)))  # noqa: B023
        assert [g and g[0] for g in got] == [wanted, wanted]
    room = instances[0].raw[0].room(2)
    instances[2].run(lambda plane, _: plane.connect({}))
    assert instances[0].raw[0].room(2) > room
    for part in range(2):
        instances[1].raw[part].send(2, header(1, 2, epoch=6), [torch.tensor(3.0)])
    new = instances[2].run(lambda plane, _: described(plane.receive(WAIT_S)))
    assert new == [(header(1, 2, epoch=6), 3.0)] * 2
