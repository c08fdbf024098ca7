"""Bulk waits for room, and nothing waits for bulk: peers that take it slowly, or not at all."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import zmq

from kunserve_sglang.core.errors import PeerLost
from kunserve_sglang.core.keys import new_keys
from kunserve_sglang.transport import HostAwareDataPlane, Packet
from kunserve_sglang.transport.windows import ON_GPU, ON_HOST, Windows, windows_within

WAIT_S = 20.0
WINDOW = 64 << 10
PIECE = 10_000

Pair = tuple[HostAwareDataPlane, HostAwareDataPlane]


@pytest.fixture(params=["shared memory", "tcp"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    keys = new_keys().members
    a, b = (
        HostAwareDataPlane(
            str(tmp_path / name),
            tcp="tcp://127.0.0.1:*",
            keys=keys,
            host=name if request.param == "tcp" else "",
            windows=Windows(activations=WINDOW, bulk=WINDOW),
        )
        for name in "ab"
    )
    a.connect({1: b.address})
    b.connect({0: a.address})
    yield a, b
    a.close()
    b.close()


def fill(plane: HostAwareDataPlane, peer: int, first: int = 0) -> int:
    """Send pieces as long as there is room; returns how many went."""
    sent = 0
    while plane.room(peer) >= PIECE:
        plane.send(
            peer,
            f"piece {first + sent}".encode(),
            [torch.zeros(PIECE, dtype=torch.uint8)],
            bulk=True,
        )
        sent += 1
        assert sent <= 2 * WINDOW // PIECE
    return sent


def received(plane: HostAwareDataPlane) -> Packet:
    packet = plane.receive(WAIT_S)
    assert packet is not None
    return packet


def until(true: Callable[[], bool], plane: HostAwareDataPlane) -> None:
    """`plane` receives meanwhile, which is when it tells what it has let go of."""
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert plane.receive(0.01) is None
        assert time.monotonic() < deadline


def test_what_a_peer_does_not_take_is_bounded(pair: Pair) -> None:
    a, b = pair
    assert a.room(1) == a.window(1) == WINDOW
    sent = fill(a, 1)
    assert (WINDOW - 2 * PIECE) // PIECE <= sent <= WINDOW // PIECE
    packets = [received(b) for _ in range(sent)]
    assert b.receive(0.05) is None
    assert a.room(1) < PIECE  # taken, and not let go of
    packets.clear()
    until(lambda: a.room(1) == WINDOW, b)
    assert fill(a, 1) > 0


def test_activations_do_not_wait_for_bulk(pair: Pair) -> None:
    """Nor for bulk that the receiver holds on to."""
    a, b = pair
    sent = fill(a, 1)
    held = [received(b) for _ in range(sent // 2)]
    for number in range(30):
        a.send(1, f"activation {number}".encode(), [torch.full((1000,), number)])
    came = [received(b).header.decode().split() for _ in range(30 + sent - len(held))]
    assert [int(n) for kind, n in came if kind == "activation"] == list(range(30))
    pieces = [p.header.decode().split()[1] for p in held]
    pieces += [n for kind, n in came if kind == "piece"]
    assert [int(n) for n in pieces] == list(range(sent))


@pytest.mark.parametrize("seed", range(4))
def test_two_slow_readers_get_everything_from_each_other(pair: Pair, seed: int) -> None:
    """Each sends when there is room, takes now and then, and holds on to some of it for a while."""
    rng = random.Random(seed)
    pieces, activations = 60, 30
    sent = [{"piece": 0, "activation": 0} for _ in pair]
    came: list[dict[str, list[int]]] = [{"piece": [], "activation": []} for _ in pair]
    held: list[list[Packet]] = [[], []]
    deadline = time.monotonic() + WAIT_S
    while any(len(c["piece"]) < pieces or len(c["activation"]) < activations for c in came):
        assert time.monotonic() < deadline, (sent, came)
        me = rng.randrange(2)
        plane, peer = pair[me], 1 - me
        size = rng.randint(1, PIECE)
        what = rng.randrange(4)
        if what == 0 and sent[me]["piece"] < pieces and plane.room(peer) >= PIECE:
            header = f"piece {sent[me]['piece']}".encode()
            plane.send(peer, header, [torch.zeros(size, dtype=torch.uint8)], bulk=True)
            sent[me]["piece"] += 1
        elif what == 1 and sent[me]["activation"] < activations:
            header = f"activation {sent[me]['activation']}".encode()
            plane.send(peer, header, [torch.zeros(size, dtype=torch.uint8)])
            sent[me]["activation"] += 1
        elif what == 2 and (packet := plane.receive()) is not None:
            kind, number = packet.header.decode().split()
            came[me][kind].append(int(number))
            held[me].append(packet)
            del packet
        elif held[me] and (what == 3 or len(held[me]) > 3):
            del held[me][rng.randrange(len(held[me]))]
    for kinds in came:
        assert kinds["piece"] == list(range(pieces))
        assert kinds["activation"] == list(range(activations))


def test_a_piece_larger_than_the_window_goes_by_itself(pair: Pair) -> None:
    a, b = pair
    a.send(1, b"large", [torch.ones(2 * WINDOW, dtype=torch.uint8)], bulk=True)
    assert received(b).tensors[0].nbytes == 2 * WINDOW
    until(lambda: a.room(1) == WINDOW, b)


def test_a_connection_that_has_ended_is_noticed_and_stays_so(tmp_path: Path) -> None:
    """By whoever waits as well as by whoever sends; nobody connects anew behind their backs."""
    keys = new_keys().members
    a, b = (
        HostAwareDataPlane(str(tmp_path / name), tcp="tcp://127.0.0.1:*", keys=keys, host=name)
        for name in "ab"
    )
    a.connect({1: b.address})
    assert a.lost([1]) == ""
    address = b.address
    b.close()
    deadline = time.monotonic() + WAIT_S
    while not a.lost([1]):
        assert time.monotonic() < deadline
        a.receive(0.01)
    assert "has ended" in a.lost([1])
    with pytest.raises(PeerLost, match="has ended"):
        a.send(1, b"anybody?")
    with pytest.raises(PeerLost, match="no instance answers"):
        a.connect({2: address})
    a.close()


def test_kernels_look_after_connections_between_hosts(pair: Pair) -> None:
    """A host that has vanished is known in seconds; a process that is stopped is not lost."""
    for plane in pair:
        if plane._tcp is None:
            continue
        connections = [c for o in plane._tcp._outboxes for c in (o._activations, o._bulk)]
        for socket in [plane._tcp._inbox, *(c._socket for c in connections)]:
            assert socket.getsockopt(zmq.TCP_KEEPALIVE) == 1
            idle, interval, count = (
                int(socket.getsockopt(option))
                for option in (
                    zmq.TCP_KEEPALIVE_IDLE,
                    zmq.TCP_KEEPALIVE_INTVL,
                    zmq.TCP_KEEPALIVE_CNT,
                )
            )
            assert 0 < idle + interval * count <= 10
            assert 0 < int(socket.getsockopt(zmq.TCP_MAXRT)) <= 10_000


@pytest.mark.parametrize("largest", [ON_HOST, ON_GPU])
def test_windows_are_a_small_part_of_the_budget(largest: Windows) -> None:
    assert windows_within(1 << 40, 7, largest) == replace(largest, peers=7)
    for budget in (448 << 20, 8 << 30, 80 << 30):
        for peers in (1, 3, 7):
            windows = windows_within(budget, peers, largest)
            assert peers * windows.held <= budget / 100
            assert windows.bulk < windows.activations


def test_the_peers_that_there_are_share_what_is_there_for_all(tmp_path: Path) -> None:
    keys = new_keys().members
    windows = Windows(activations=WINDOW, bulk=WINDOW, peers=3)
    planes = [
        HostAwareDataPlane(
            str(tmp_path / name), tcp="tcp://127.0.0.1:*", keys=keys, host=name, windows=windows
        )
        for name in "abcd"
    ]
    first, *others = planes
    try:
        for connected, times in ((1, 3), (3, 1), (2, 1.5)):
            first.connect({n: plane.address for n, plane in enumerate(others[:connected])})
            assert {first.window(n) for n in range(connected)} == {int(times * WINDOW)}
            assert first.room(0) == int(times * WINDOW)
    finally:
        for plane in planes:
            plane.close()


@pytest.mark.parametrize("largest", [ON_HOST, ON_GPU])
@pytest.mark.parametrize("connected", [1, 2, 7])
def test_shared_windows_stay_within_the_budget(largest: Windows, connected: int) -> None:
    for budget in (64 << 20, 640 << 20, 80 << 30):
        windows = windows_within(budget, 7, largest)
        assert windows.bulk_among(connected) >= windows.bulk
        assert connected * windows.bulk_among(connected) <= 7 * windows.bulk


def test_one_that_was_cut_off_is_connected_to_again_when_it_is_asked_for(tmp_path: Path) -> None:
    """It is where it was, so by its address alone nobody could tell."""
    keys = new_keys().members
    a = HostAwareDataPlane(str(tmp_path / "a"), tcp="tcp://127.0.0.1:*", keys=keys, host="a")
    before = HostAwareDataPlane(str(tmp_path / "b"), tcp="tcp://127.0.0.1:*", keys=keys, host="b")
    a.connect({1: before.address})
    address = before.address
    before.close()
    deadline = time.monotonic() + WAIT_S
    while not a.lost([1]):
        assert time.monotonic() < deadline
        a.receive(0.01)
    tcp = json.loads(address)["tcp"]
    back = HostAwareDataPlane(str(tmp_path / "b"), tcp=tcp, keys=keys, host="b")
    assert back.address == address
    a.connect({1: address})
    assert a.lost([1]) == ""
    a.send(1, b"again")
    a.send(1, b"and much", [torch.ones(8)], bulk=True)
    assert {received(back).header for _ in range(2)} == {b"again", b"and much"}
    a.close()
    back.close()
