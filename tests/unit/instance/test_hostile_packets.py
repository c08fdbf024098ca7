"""Whatever arrives on the data socket, an instance goes on.

`KUNSERVE_PACKETS` says how many packets of each kind, `KUNSERVE_FIRST_SEED` where to begin.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kunserve_sglang.core.errors import PeerLost
from kunserve_sglang.core.keys import new_keys
from kunserve_sglang.instance.packets import wire
from kunserve_sglang.testing.hostile_packets import hostile_frames, hostile_packets
from kunserve_sglang.transport.local import LocalDataPlane
from kunserve_sglang.transport.tcp import TcpDataPlane
from tests.support.stage import (
    EPOCH,
    Stage,
    micro_batch,
    valid_packets,
)

PACKETS = int(os.environ.get("KUNSERVE_PACKETS", "3000"))
FIRST = int(os.environ.get("KUNSERVE_FIRST_SEED", "0"))
WAIT_S = 10.0


@pytest.fixture
def stage() -> Iterator[Stage]:
    stage = Stage()
    yield stage
    stage.pool.driver.close()


@settings(
    max_examples=max(1, PACKETS // 100),
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.integers(0, 1 << 32))
def test_a_member_goes_on_whatever_another_sends(stage: Stage, seed: int) -> None:
    stage.begin()
    for packet in islice(hostile_packets(FIRST + seed, valid_packets()), 100):
        stage.takes(packet)
    stage.begin()
    ran = stage.engine.ran
    stage.takes(micro_batch(0))
    assert stage.engine.ran == ran + 1
    assert wire.decode(stage.wire.sent[-1][1]).epoch == EPOCH
    stage.parts.check_pages()


def test_spoilt_packets_are_counted(stage: Stage) -> None:
    for packet in islice(hostile_packets(FIRST, valid_packets()), 500):
        stage.takes(packet)
    assert stage.work.malformed_packets > 200


def test_a_micro_batch_that_is_sent_again_is_run_once(stage: Stage) -> None:
    stage.takes(micro_batch(0))
    stage.takes(micro_batch(0))
    stage.takes(micro_batch(1))
    assert stage.engine.ran == 2
    assert stage.work.malformed_packets == 1


def test_a_gap_is_a_lost_peer(stage: Stage) -> None:
    stage.takes(micro_batch(0))
    stage.wire.arriving.append(micro_batch(2))
    with pytest.raises(PeerLost, match="micro-batch 2 of instance 0 came after 0"):
        stage.work.serve_one(0.0)


def test_nobody_who_is_no_peer_is_listened_to(stage: Stage) -> None:
    stage.plane.connect({})
    stage.takes(micro_batch(0))
    assert stage.engine.ran == 0
    assert stage.work.malformed_packets == 1


def test_tcp_goes_on_whatever_a_member_sends() -> None:
    keys, device = new_keys().members, torch.device("cpu")
    contexts: list[zmq.Context[Any]] = [zmq.Context() for _ in range(2)]
    planes = [TcpDataPlane(c, "tcp://127.0.0.1:*", keys, device) for c in contexts]
    stranger, friend = planes
    stranger.connect({0: friend.address})
    friend.connect({1: stranger.address})
    good = [b"b", b"header", b"\x91\x92\xa7float32\x91\x03", bytes(12)]
    connection = stranger._outboxes[0]._bulk
    received = 0
    for frames in islice(hostile_frames(FIRST, good), PACKETS):
        connection.send(frames)
        while friend.receive() is not None:
            received += 1
    stranger.send(0, b"the end", [torch.ones(3)])
    deadline = time.monotonic() + WAIT_S
    while (packet := friend.receive(0.1)) is None or packet.header != b"the end":
        received += packet is not None
        assert time.monotonic() < deadline
    while friend.receive(0.2) is not None:
        received += 1
    assert received + friend.malformed == PACKETS
    assert friend.malformed > PACKETS // 4
    for plane in planes:
        plane.close()
    for context in contexts:
        context.term()


def test_shared_memory_goes_on_whatever_is_sent(tmp_path: Path) -> None:
    """By somebody without a ring, and by a sender whose notes are wrong."""
    a, b = (LocalDataPlane(str(tmp_path / name)) for name in "ab")
    a.connect({1: b.address})
    a.send(1, b"hello", [torch.ones(3)])
    packet = b.receive(WAIT_S)
    assert packet is not None
    del packet
    outbox = a._outboxes[1]
    note = [b"header", [["float32", [3]]], 64, 128, False]
    encoded = msgspec.msgpack.encode(note)
    for frames in islice(hostile_frames(FIRST, [encoded]), PACKETS):
        for frame in frames:
            outbox._send(frame[:1000] or b"\0", [])
            a.receive()
            b.receive()
    a.send(1, b"the end", [torch.ones(3)])
    deadline = time.monotonic() + WAIT_S
    while (packet := b.receive(0.1)) is None or packet.header != b"the end":
        a.receive()
        assert time.monotonic() < deadline
    assert b.malformed > PACKETS // 4
    a.close()
    b.close()
