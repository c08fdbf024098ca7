"""Layer ranges, capacities and what moves between two layouts."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from kunserve_sglang.core.layout import (
    LayerRange,
    Layout,
    Member,
    Move,
    kv_moves,
    parameter_loads,
)
from tests.support.clusters import profile


def layout(*members: tuple[int, int, int]) -> Layout:
    return Layout(
        epoch=1,
        members=tuple(
            Member(instance=i, layers=LayerRange(lo, hi), capacity=10, address="")
            for i, lo, hi in members
        ),
    )


def test_coverage_is_checked() -> None:
    assert layout((0, 0, 5), (1, 5, 9)).covers(9)
    assert not layout((0, 0, 5), (1, 6, 9)).covers(9)
    assert not layout((0, 0, 5), (1, 5, 9)).covers(10)
    assert not layout((0, 0, 5), (1, 5, 5), (2, 5, 9)).covers(9)


@given(
    st.integers(1, 30),
    st.integers(1, 8),
    st.integers(100, 9000),
    st.integers(100, 9000),
    st.sampled_from([1, 2, 16, 100]),
)
def test_capacity_is_the_most_that_fits(
    layers: int, owners: int, key: int, value: int, block: int
) -> None:
    memory = msgspec.structs.replace(
        profile(), key_row_bytes=key, value_row_bytes=value, stride=1 << 40, block_slots=block
    )
    held = LayerRange(0, layers)
    slots = memory.capacity(held, owners)
    budget = memory.pages - memory.parameter_pages(held)
    assert slots % block == 0
    assert memory.idle_share(held, owners) % block == memory.max_slots() % block == 0
    if slots:
        assert owners * layers * memory.kv_pages(slots) <= budget
    assert owners * layers * memory.kv_pages(slots + block) > budget


def test_capacity_is_zero_where_not_even_the_parameters_fit() -> None:
    memory = profile(pages=100)
    assert memory.capacity(LayerRange(0, 30), 1) == 0


def test_a_drop_moves_each_owners_other_half() -> None:
    before = [layout((0, 0, 4)), layout((1, 0, 4))]
    after = [layout((0, 0, 2), (1, 2, 4))]
    assert kv_moves(before, after) == [
        Move(1, LayerRange(0, 2), source=1, target=0),
        Move(0, LayerRange(2, 4), source=0, target=1),
    ]
    assert parameter_loads(before, after) == []


def test_a_restore_is_the_way_back() -> None:
    apart = [layout((0, 0, 4)), layout((1, 0, 4))]
    together = [layout((0, 0, 2), (1, 2, 4))]
    there = {(m.owner, m.layers, m.source, m.target) for m in kv_moves(apart, together)}
    back = {(m.owner, m.layers, m.target, m.source) for m in kv_moves(together, apart)}
    assert there == back
    loads = {(p.layer, p.source, p.target) for p in parameter_loads(together, apart)}
    assert loads == {(2, 1, 0), (3, 1, 0), (0, 0, 1), (1, 0, 1)}


def test_merging_groups_moves_only_what_changes_its_holder() -> None:
    before = [layout((0, 0, 4), (1, 4, 8)), layout((2, 0, 4), (3, 4, 8))]
    after = [layout((0, 0, 2), (2, 2, 4), (1, 4, 6), (3, 6, 8))]
    moves = kv_moves(before, after)
    assert [m for m in moves if m.owner == 0] == [
        Move(0, LayerRange(2, 4), source=0, target=2),
        Move(0, LayerRange(6, 8), source=1, target=3),
    ]
    assert len(moves) == 8


def test_sources_of_parameters_take_turns() -> None:
    before = [layout((0, 0, 4)), layout((1, 0, 4)), layout((2, 0, 2), (3, 2, 4))]
    after = [layout((2, 0, 4)), layout((3, 0, 4))]
    sources = [p.source for p in parameter_loads(before, after)]
    assert len(set(sources)) == 3
