"""Taken slots and where they go when a capacity shrinks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kunserve_sglang.core.errors import InternalError
from kunserve_sglang.instance.transitions.compaction import compact


def slots_of(blocks: list[int], block_slots: int) -> torch.Tensor:
    return torch.tensor([b * block_slots + i for b in blocks for i in range(block_slots)])


@given(st.sampled_from([1, 2, 16]), st.sets(st.integers(1, 40), max_size=20), st.integers(0, 20))
def test_blocks_stay_whole_and_those_below_stay(
    block_slots: int, blocks: set[int], room: int
) -> None:
    taken = slots_of(sorted(blocks), block_slots).long()
    capacity = (len(blocks) + room) * block_slots
    change = compact(taken, capacity, block_slots)
    assert torch.equal(change.source, taken)
    assert len(change.target.unique()) == len(taken)
    assert torch.equal(change.target % block_slots, taken % block_slots)
    assert torch.equal(
        change.target.view(-1, block_slots) // block_slots,
        change.target.view(-1, block_slots)[:, :1]
        // block_slots
        * torch.ones(1, block_slots).long(),
    )
    for source, target in zip(taken.tolist(), change.target.tolist(), strict=True):
        assert target >= block_slots  # the first block is the dummy
        assert target // block_slots <= capacity // block_slots
        if source // block_slots <= capacity // block_slots:
            assert target == source
    assert change.highest <= capacity
    assert change.highest % block_slots == 0


def test_only_as_many_as_there_is_room_for() -> None:
    with pytest.raises(InternalError, match="2 slots or blocks cannot be compacted into 1"):
        compact(slots_of([2, 5], 4), 4, 4)


def test_the_highest_is_the_least_capacity_that_has_them_all() -> None:
    assert compact(torch.tensor([3, 7]), 10).highest == 7
    assert compact(slots_of([1, 3], 16), 160, 16).highest == 48
    assert compact(torch.empty(0, dtype=torch.int64), 160, 16).highest == 0
