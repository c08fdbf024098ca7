"""Where layers are cut: inside what is held, for the most slots, as evenly as can be."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kunserve_sglang.core.cuts import best_cut
from kunserve_sglang.core.layout import LayerRange, MemoryProfile
from tests.support.clusters import profile


def cut(held: list[LayerRange], memory: MemoryProfile | None = None) -> list[LayerRange]:
    ranges, _ = best_cut(tuple(held), (memory or profile(),) * len(held))
    return list(ranges)


def every_cut(held: list[LayerRange], layers: int) -> list[list[LayerRange]]:
    """All contiguous cuts inside what is held."""
    found = []
    for inner in combinations(range(1, layers), len(held) - 1):
        ranges = [LayerRange(lo, hi) for lo, hi in pairwise((0, *inner, layers))]
        if all(r.within(h) for r, h in zip(ranges, held, strict=True)):
            found.append(ranges)
    return found


def slots(ranges: list[LayerRange], memory: list[MemoryProfile]) -> int:
    return min(m.capacity(r, len(ranges)) for r, m in zip(ranges, memory, strict=True))


def test_halves_of_two_full_replicas() -> None:
    full = LayerRange(0, 30)
    assert cut([full, full]) == [LayerRange(0, 15), LayerRange(15, 30)]


def test_a_cut_stays_inside_what_is_held() -> None:
    held = [LayerRange(0, 4), LayerRange(0, 30), LayerRange(15, 30)]
    ranges = cut(held)
    assert ranges[0] == LayerRange(0, 4)
    assert ranges[1].lo == 4
    assert ranges[1].hi in (17, 18)


def test_halves_of_two_pairs_are_cut_again() -> None:
    low, high = LayerRange(0, 15), LayerRange(15, 30)
    assert [len(r) for r in cut([low, low, high, high])] == [8, 7, 7, 8]


def test_ranges_that_leave_a_hole_cannot_be_cut() -> None:
    with pytest.raises(ValueError, match="no contiguous cut"):
        cut([LayerRange(0, 4), LayerRange(6, 10)])


def test_more_members_than_layers_cannot_be_cut() -> None:
    with pytest.raises(ValueError, match="no contiguous cut"):
        cut([LayerRange(0, 2)] * 3)


@given(st.integers(2, 8), st.integers(0, 40))
def test_cuts_of_full_replicas_are_even(members: int, extra: int) -> None:
    layers = members + extra
    lengths = [len(r) for r in cut([LayerRange(0, layers)] * members, profile(layers=layers))]
    assert sum(lengths) == layers
    assert max(lengths) - min(lengths) <= 1


def test_the_larger_budget_takes_the_larger_part() -> None:
    memory = (profile(pages=4000), profile(pages=8000))
    ranges, capacity = best_cut((LayerRange(0, 30),) * 2, memory)
    assert len(ranges[0]) < len(ranges[1])
    even = [LayerRange(0, 15), LayerRange(15, 30)]
    assert capacity > 1.3 * slots(even, list(memory))


@settings(max_examples=300)
@given(st.data())
def test_no_cut_has_more_slots(data: st.DataObject) -> None:
    """Against all cuts: any budgets, any uneven layers, any ranges that members may hold."""
    layers = data.draw(st.integers(3, 10))
    members = data.draw(st.integers(2, min(4, layers)))
    block = data.draw(st.sampled_from([1, 1, 16, 48]))
    layer_pages = tuple(data.draw(st.lists(st.integers(1, 60), min_size=layers, max_size=layers)))
    memory = [
        MemoryProfile(
            page_bytes=4096,
            pages=sum(layer_pages) + data.draw(st.integers(0, 500)),
            layer_pages=layer_pages,
            key_row_bytes=data.draw(st.sampled_from([128, 192])),
            value_row_bytes=128,
            stride=48 << 16,
            owners=8,
            block_slots=block,
        )
        for _ in range(members)
    ]
    ends = st.tuples(st.integers(0, layers - 1), st.integers(1, layers)).filter(
        lambda r: r[0] < r[1]
    )
    full = st.just((0, layers))
    held = [LayerRange(*data.draw(ends | full)) for _ in range(members)]
    held.sort(key=lambda r: r.lo + r.hi)
    possible = every_cut(held, layers)
    assume(max(r.hi for r in held) == layers)
    if not possible:
        with pytest.raises(ValueError, match="no contiguous cut"):
            best_cut(tuple(held), tuple(memory))
        return
    ranges, capacity = best_cut(tuple(held), tuple(memory))
    assert list(ranges) in possible
    assert capacity == slots(list(ranges), memory)
    assert capacity == max(slots(r, memory) for r in possible)
