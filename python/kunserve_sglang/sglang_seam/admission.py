"""One correction to SGLang's admission, which a capacity that shrinks makes necessary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kunserve_sglang.core.layout import in_blocks
from kunserve_sglang.sglang_seam.lengths import max_output


def next_chunk_within_pool(original: Callable[..., Any], adder: Any, req: Any) -> Any:
    """Around `PrefillAdder.add_chunked_req`: never schedule more tokens than the pool can hold.

    SGLang continues a chunked prompt even when its budget is spent, and fails with "out of memory"
    when the pool is really full: rare with a fixed pool, but likely after a transition has taken
    slots away in the middle of a prompt. Here the chunk is cut to what is left beside what one
    running request needs to end or, with nothing left, parked as SGLang does for hybrid models,
    until running requests have freed slots. Taking all would leave the running requests nothing
    but to be retracted, and the last of them to be aborted. Nobody else is admitted meanwhile:
    there can be only one prompt in chunks.

    A prompt whose whole rest still fits is not held back: at its end it can be retracted like any
    other, while a parked one keeps its slots from the last running request.
    """
    room = adder.token_to_kv_pool_allocator.available_size() + adder.tree_cache.evictable_size()
    running, page = adder.running_batch.reqs, adder.page_size
    rest = len(req.full_untruncated_fill_ids) - len(req.prefix_indices)
    if adder.rem_chunk_tokens <= 0:  # those that decode along take all that a step may have
        return req
    steps = -(-rest // adder.rem_chunk_tokens)
    if in_blocks(rest, page) + in_blocks(steps, page) * len(running) <= room:
        return original(adder, req)
    along = adder.cur_rem_token_offset  # what those need that decode in the very same step
    room -= max(along, in_blocks(max(map(max_output, running), default=0), page))
    if room <= 0:
        adder.rem_chunk_tokens = 0
        return req
    withheld = max(0, adder.rem_chunk_tokens - room)
    adder.rem_chunk_tokens -= withheld
    unfinished = original(adder, req)
    if unfinished is None:
        adder.rem_chunk_tokens += withheld
    else:
        adder.rem_chunk_tokens = 0
    return unfinished
