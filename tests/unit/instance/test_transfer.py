"""KV rows and parameters on their way between two members while micro-batches run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from kunserve_sglang.core.errors import PeerLost
from kunserve_sglang.core.layout import LayerRange, Move, ParameterLoad
from kunserve_sglang.instance.packets import wire
from kunserve_sglang.instance.store.kv_store import KvShape, KvStore, aligned_stride
from kunserve_sglang.instance.store.parameters import ParameterStore
from kunserve_sglang.instance.transfer.transfer import Transfer
from kunserve_sglang.memory import open_pool
from kunserve_sglang.transport import Packet
from kunserve_sglang.transport.local import LocalDataPlane
from tests.support.waiting import until

PAGE = 4096
SLOTS = 300
SHAPE = KvShape(layers=4, heads=2, key_dim=16, value_dim=8, dtype=torch.float32)
LOWER, UPPER = LayerRange(0, 2), LayerRange(2, 4)
MOVE = Move(0, UPPER, source=0, target=1)
TAKEN = torch.arange(1, 201)


@dataclass
class Side:
    kv: KvStore
    parameters: ParameterStore
    plane: LocalDataPlane

    def transfer(
        self,
        me: int,
        serving: LayerRange,
        loads: tuple[ParameterLoad, ...] = (),
        *,
        urgent: bool = False,
    ) -> Transfer:
        return Transfer(
            me,
            7,
            moves=[MOVE],
            loads=loads,
            taken={0: TAKEN},
            serving=serving,
            kv=self.kv,
            parameters=self.parameters,
            plane=self.plane,
            clock=time.monotonic,
            timeout_s=0.2,
            urgent=urgent,
        )

    def rows(self, slots: torch.Tensor) -> torch.Tensor:
        return self.kv.gather(UPPER, 0, slots)[0]

    def write(self, slots: torch.Tensor, value: float) -> None:
        k = torch.full((2, len(slots), 2, 16), value)
        self.kv.scatter(UPPER, 0, slots, k, k[..., :8])

    def next_piece(self) -> Packet | None:
        return self.plane.receive(0.001)


@pytest.fixture
def sides(tmp_path: Path) -> Iterator[tuple[Side, Side]]:
    """Owner 0 and a stage; the stage has room for the owner's upper layers, and other weights."""
    made = []
    for number in range(2):
        pool = open_pool(torch.device("cpu"), 2000 * PAGE, page_bytes=PAGE)
        layers = [nn.Linear(700, 700) for _ in range(SHAPE.layers)]
        parameters = ParameterStore(pool, layers)
        stride = aligned_stride(SLOTS, SHAPE, PAGE)
        kv = KvStore(pool, SHAPE, instance=number, stride=stride, owners=2)
        kv.admit(0)
        for layer in UPPER:
            kv.resize(layer, 0, SLOTS)
        made.append(Side(kv, parameters, LocalDataPlane(f"{tmp_path}/{number}")))
    for number, side in enumerate(made):
        side.plane.connect({1 - number: made[1 - number].plane.address})
    rows = torch.arange(1, SLOTS + 1)
    k = torch.randn(2, SLOTS, 2, 16)
    made[0].kv.scatter(UPPER, 0, rows, k, k[..., :8])
    yield made[0], made[1]
    for side in made:
        side.plane.close()


def deliver(side: Side, transfer: Transfer) -> None:
    while (packet := side.plane.receive()) is not None:
        transfer.store(packet, wire.decode(packet.header))


def test_after_a_drop_rows_follow_piece_by_piece(sides: tuple[Side, Side]) -> None:
    owner, stage = sides
    out, into = owner.transfer(0, LOWER), stage.transfer(1, UPPER)
    assert out.urgent
    assert not out.complete
    while out.pump(0.0):
        assert not into.complete or not out.unfinished
        deliver(stage, into)
    assert out.complete
    assert into.complete
    assert torch.equal(stage.rows(TAKEN), owner.rows(TAKEN))
    assert out.sent_kv_bytes == len(TAKEN) * 2 * (SHAPE.key_row_bytes + SHAPE.value_row_bytes)
    out.release_left()
    assert owner.kv.buffers(2) is None


def test_a_micro_batch_takes_its_rows_along_and_only_once(sides: tuple[Side, Side]) -> None:
    owner, stage = sides
    out, into = owner.transfer(0, LOWER), stage.transfer(1, UPPER)
    mine = torch.tensor([3, 7, 3, 150])
    assert out.unsent(mine[:2]) == 2 * 2 * (SHAPE.key_row_bytes + SHAPE.value_row_bytes)
    out.take_along(mine)
    out.take_along(mine)
    assert out.unsent(mine) == 0
    into.before_run(0, mine, torch.tensor([201]), stage.next_piece)
    assert torch.equal(stage.rows(mine), owner.rows(mine))
    assert stage.plane.receive() is None
    assert not into.complete


def test_a_stage_waits_for_rows_that_are_late(sides: tuple[Side, Side]) -> None:
    owner, stage = sides
    out, into = owner.transfer(0, LOWER), stage.transfer(1, UPPER)
    asked = 0

    def next_piece() -> Packet | None:
        nonlocal asked
        asked += 1
        if asked == 3:
            out.take_along(torch.tensor([5]))
        return stage.next_piece()

    into.before_run(0, torch.tensor([5]), torch.tensor([201]), next_piece)
    assert asked >= 3
    assert torch.equal(stage.rows(torch.tensor([5])), owner.rows(torch.tensor([5])))


def test_rows_that_never_come_are_a_lost_peer(sides: tuple[Side, Side]) -> None:
    _, stage = sides
    into = stage.transfer(1, UPPER)
    with pytest.raises(PeerLost, match="did not arrive"):
        into.before_run(0, torch.tensor([5]), torch.tensor([201]), stage.next_piece)


def test_what_a_micro_batch_wrote_is_newer_than_what_was_on_its_way(
    sides: tuple[Side, Side],
) -> None:
    """The slot was freed and given to another request before its old row arrived."""
    owner, stage = sides
    out, into = owner.transfer(0, LOWER), stage.transfer(1, UPPER)
    reused = torch.tensor([9])
    into.before_run(0, reused, reused, stage.next_piece)
    stage.write(reused, 42.0)
    while out.pump(0.0):
        deliver(stage, into)
    assert into.complete
    assert (stage.rows(reused) == 42.0).all()
    others = TAKEN[TAKEN != 9]
    assert torch.equal(stage.rows(others), owner.rows(others))


def test_fetching_ahead_sends_again_what_is_written_meanwhile(sides: tuple[Side, Side]) -> None:
    """The source still runs these layers; the last rows go at the switch."""
    source, target = sides
    out, into = source.transfer(0, UPPER), target.transfer(1, LOWER)
    assert not out.urgent
    assert source.transfer(0, UPPER, urgent=True).urgent
    while out.pump(0.0):
        deliver(target, into)
    assert into.complete
    new = torch.tensor([9, 250])
    out.before_run(0, new, new, source.next_piece)
    source.write(new, 42.0)
    assert out.unfinished
    taken = torch.cat((TAKEN, torch.tensor([250])))
    out.send_rest(8, {0: taken})
    into.receive_rest(lambda _: target.next_piece(), deadline=float("inf"))
    assert torch.equal(target.rows(taken), source.rows(taken))


def test_parameters_are_fetched_ahead_and_can_be_given_up(sides: tuple[Side, Side]) -> None:
    source, target = sides
    target.parameters.drop(2)
    before = target.parameters.pages
    load = ParameterLoad(2, source=0, target=1)
    out = source.transfer(0, UPPER, (load,))
    into = target.transfer(1, LOWER, (load,))
    into.reserve(lambda _: SLOTS)
    while out.pump(0.0):
        deliver(target, into)
    assert out.complete
    assert into.complete
    into.cancel()
    assert target.parameters.pages == before
    assert target.kv.buffers(2) is None
    assert 2 not in target.parameters.held()


def test_fetched_parameters_are_attached_at_the_switch(sides: tuple[Side, Side]) -> None:
    source, target = sides
    target.parameters.drop(2)
    load = ParameterLoad(2, source=0, target=1)
    out, into = source.transfer(0, UPPER, (load,)), target.transfer(1, LOWER, (load,))
    into.reserve(lambda _: SLOTS)
    while out.pump(0.0):
        deliver(target, into)
    assert 2 not in target.parameters.held()
    out.send_rest(8, {0: TAKEN})
    into.receive_rest(lambda _: target.next_piece(), deadline=float("inf"))
    assert torch.equal(target.parameters.bytes_of(2), source.parameters.bytes_of(2))


def test_a_transfer_that_stands_still_is_a_lost_peer(sides: tuple[Side, Side]) -> None:
    """Otherwise its member would refuse all transitions for good."""
    owner, stage = sides
    out, into = owner.transfer(0, LOWER), stage.transfer(1, UPPER)
    assert out.pump(0.0)
    deliver(stage, into)
    into.check_progress()
    until(lambda: time.monotonic() > into._moved + 0.2)
    with pytest.raises(PeerLost, match="has stopped"):
        into.check_progress()


def test_a_piece_that_is_missing_is_a_lost_peer(sides: tuple[Side, Side]) -> None:
    """What comes after it would pass for all there is."""
    owner, stage = sides
    out, into = owner.transfer(0, LOWER), stage.transfer(1, UPPER)
    out.take_along(torch.tensor([5, 6]))
    assert stage.plane.receive(1.0) is not None
    while out.pump(0.0):
        pass
    with pytest.raises(PeerLost, match="with a gap"):
        deliver(stage, into)


def test_a_piece_that_comes_again_changes_nothing(sides: tuple[Side, Side]) -> None:
    owner, stage = sides
    out, into = owner.transfer(0, LOWER), stage.transfer(1, UPPER)
    slots = torch.tensor([5, 6])
    out.take_along(slots)
    piece = stage.plane.receive(1.0)
    assert piece is not None
    again = Packet(piece.header, [t.clone() for t in piece.tensors])
    into.store(piece, wire.decode(piece.header))
    into.before_run(0, slots, slots, stage.next_piece)
    stage.write(slots, 42.0)
    into.store(again, wire.decode(again.header))
    assert (stage.rows(slots) == 42.0).all()


def test_a_part_of_a_layer_that_is_missing_is_a_lost_peer(sides: tuple[Side, Side]) -> None:
    source, target = sides
    target.parameters.drop(2)
    load = ParameterLoad(2, source=0, target=1)
    out, into = source.transfer(0, UPPER, (load,)), target.transfer(1, LOWER, (load,))
    into.reserve(lambda _: SLOTS)
    while out.pump(0.0):
        pass
    pieces = []
    while (packet := target.plane.receive()) is not None:
        pieces.append((packet, wire.decode(packet.header)))
    first = next(p for p in pieces if isinstance(p[1], wire.LayerParameters))
    pieces.remove(first)

    def store_the_others() -> None:
        for packet, header in pieces:
            into.store(packet, header)

    with pytest.raises(PeerLost, match="layer 2 came with a gap"):
        store_the_others()
