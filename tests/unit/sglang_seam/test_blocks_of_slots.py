"""Which slots go to which tokens where they are handed out in blocks."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.mem_cache.allocator import alloc_extend_naive

from kunserve_sglang.core.errors import InternalError
from kunserve_sglang.sglang_seam.allocator import (
    ElasticAllocator,
    allocator_for,
    extended,
    new_blocks,
)

PAGE = 4


def allocator(page_size: int = PAGE, blocks: int = 8) -> ElasticAllocator:
    return allocator_for(
        page_size,
        blocks * page_size,
        dtype=torch.float32,
        device="cpu",
        kvcache=None,
        need_sort=False,
    )


@given(st.sampled_from([2, 4, 16]), st.data())
def test_slots_are_those_that_sglang_would_take(page_size: int, data: st.DataObject) -> None:
    spans = data.draw(
        st.lists(st.tuples(st.integers(0, 40), st.integers(1, 40)), min_size=1, max_size=6)
    )
    prefix = torch.tensor([p for p, _ in spans])
    whole = torch.tensor([p + n for p, n in spans])
    random_blocks = data.draw(st.permutations(range(1, 200)))
    last = torch.tensor(
        [
            -1 if not p else block * page_size + (p - 1) % page_size
            for (p, _), block in zip(spans, random_blocks, strict=False)
        ]
    )
    free = torch.tensor(random_blocks[len(spans) :])
    expected = torch.empty(sum(n for _, n in spans), dtype=torch.int64)
    alloc_extend_naive(prefix, whole, last, free, expected, page_size, "cpu")
    blocks = free[: int(new_blocks(prefix, whole, page_size).sum())]
    assert torch.equal(extended(prefix, whole, last, blocks, page_size), expected)


def test_a_request_that_grows_stays_in_its_block() -> None:
    slots = allocator()
    last = torch.tensor([-1])
    taken = []
    for length in range(1, 10):
        lengths = torch.tensor([length])
        last = slots.alloc_decode(lengths, lengths, last)
        taken.append(int(last))
    assert taken == [4, 5, 6, 7, 8, 9, 10, 11, 12]
    assert slots.taken().tolist() == list(range(4, 16))
    assert slots.available_size() == 5 * PAGE


def test_without_a_block_left_nothing_is_taken() -> None:
    slots = allocator(blocks=2)
    empty, nine = torch.tensor([0]), torch.tensor([9])
    assert slots.alloc_extend(empty, empty, nine, nine, torch.tensor([-1]), 9) is None
    assert slots.available_size() == 8
    two = torch.tensor([8])
    assert len(slots.alloc_extend(empty, empty, two, two, torch.tensor([-1]), 8)) == 8
    assert slots.available_size() == 0


@pytest.mark.parametrize("page_size", [1, 4])
def test_low_blocks_are_handed_out_again_first(page_size: int) -> None:
    slots = allocator(page_size)
    slots.prefer_low_slots(True)
    size = torch.tensor([6 * page_size])
    nothing = torch.tensor([0])

    def take(count: torch.Tensor) -> torch.Tensor:
        if page_size == 1:
            return slots.alloc(int(count))
        return slots.alloc_extend(nothing, nothing, count, count, torch.tensor([-1]), int(count))

    taken = take(size)
    slots.free(taken[: 2 * page_size])
    again = take(torch.tensor([page_size]))
    assert again.tolist() == list(range(page_size, 2 * page_size))


@pytest.mark.parametrize("page_size", [1, 4])
def test_a_capacity_moves_in_whole_blocks(page_size: int) -> None:
    slots = allocator(page_size)
    rng = random.Random(page_size)
    blocks = sorted(rng.sample(range(1, 6), 3))
    taken = torch.cat([torch.arange(b * page_size, (b + 1) * page_size) for b in blocks])
    slots.rebuild(5 * page_size, taken)
    assert torch.equal(slots.taken(), taken)
    assert slots.available_size() == 2 * page_size
    slots.rebuild(20 * page_size, slots.taken())
    assert slots.available_size() == 17 * page_size
    with pytest.raises(InternalError, match="is taken"):
        slots.rebuild((blocks[-1] - 1) * page_size, taken)
    if page_size > 1:
        with pytest.raises(InternalError, match="whole blocks"):
            slots.rebuild(5 * page_size + 1, taken)
