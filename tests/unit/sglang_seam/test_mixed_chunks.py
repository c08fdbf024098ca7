"""Room in the pool for a step that prefills and decodes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kunserve_sglang.sglang_seam.admission import next_chunk_within_pool
from kunserve_sglang.sglang_seam.mixed_chunks import reserve_blocks


def adder(*, free: int, chunk: int, outputs: list[int], along: int = 0, page: int = 1) -> Any:
    """As much of SGLang's `PrefillAdder` as is looked at."""
    running = [
        SimpleNamespace(
            sampling_params=SimpleNamespace(max_new_tokens=tokens), output_ids=[], seqlen=10
        )
        for tokens in outputs
    ]
    return SimpleNamespace(
        page_size=page,
        rem_chunk_tokens=chunk,
        cur_rem_token_offset=along,
        rem_total_token_offset=along,
        running_batch=SimpleNamespace(
            reqs=running, new_tokens_required_next_decode=lambda: page * len(running)
        ),
        token_to_kv_pool_allocator=SimpleNamespace(available_size=lambda: free),
        tree_cache=SimpleNamespace(evictable_size=lambda: 0),
    )


def chunk_of(adder: Any, rest: int) -> int | None:
    """Tokens that SGLang may take of a prompt of which so many are left; None: none at all."""
    request = SimpleNamespace(full_untruncated_fill_ids=range(rest), prefix_indices=())
    taken: list[int] = []

    def original(adder: Any, req: Any) -> Any:
        taken.append(min(rest, adder.rem_chunk_tokens))
        return req if rest > adder.rem_chunk_tokens else None

    next_chunk_within_pool(original, adder, request)
    return taken[0] if taken else None


def test_who_decodes_along_has_room_first() -> None:
    assert chunk_of(adder(free=100, chunk=64, outputs=[2] * 40), 500) == 64
    assert chunk_of(adder(free=100, chunk=64, outputs=[2] * 40, along=40), 500) == 60
    assert chunk_of(adder(free=40, chunk=64, outputs=[2] * 40, along=40), 500) is None


def test_a_prompt_waits_while_those_that_decode_take_the_whole_step() -> None:
    assert chunk_of(adder(free=1000, chunk=0, outputs=[5] * 64, along=64), 500) is None


@pytest.mark.parametrize("page", [1, 16])
def test_chunks_leave_whole_blocks(page: int) -> None:
    """The longest answer has 20 tokens left, which may take 32 slots in blocks of 16."""
    assert chunk_of(adder(free=96, chunk=256, outputs=[20], page=page), 500) == 96 - (
        20 if page == 1 else 32
    )


def test_each_that_decodes_along_may_begin_a_block() -> None:
    for page, reserved in ((1, 3), (16, 48)):
        made = adder(free=0, chunk=64, outputs=[5] * 3, along=3, page=page)
        reserve_blocks(None, made)
        assert (made.cur_rem_token_offset, made.rem_total_token_offset) == (reserved, reserved)
    plain = adder(free=0, chunk=64, outputs=[5] * 3, page=16)
    reserve_blocks(None, plain)
    assert plain.cur_rem_token_offset == 0
