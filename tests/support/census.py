"""Where a scheduler keeps its requests: each unfinished one in one place (invariant 4)."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from kunserve_sglang.core.blocks import block_hashes


def whereabouts(scheduler: Any) -> dict[str, list[str]]:
    """The places of each unfinished request, by its id, at a step boundary.

    A prompt that comes in chunks is in one place of its own until its last chunk is launched,
    whatever batches its chunks are in. SGLang's copies of a batch whose result is pending are none.
    """
    found: defaultdict[str, list[str]] = defaultdict(list)

    def put(place: str, requests: Iterable[Any], *apart: Any) -> None:
        for request in requests:
            if request not in apart and not request.finished():
                found[request.rid].append(place)

    chunked = scheduler.chunked_req
    put("waiting", scheduler.waiting_queue)
    put("waiting for a grammar", scheduler.grammar_manager.grammar_queue)
    put("chunked", [] if chunked is None else [chunked])
    cooperation = scheduler.cooperation
    if cooperation._entered:
        put("ready", cooperation._ready.reqs)
        for flight in cooperation._flights:
            if flight.batch is None:  # a failure has taken its requests back
                continue
            put(f"flight {flight.sequence}", flight.batch.reqs, flight.batch.chunked_req)
        return found
    put("running", scheduler.running_batch.reqs)
    last = scheduler.last_batch
    if last is not None and last.forward_mode.is_extend():
        put("last", last.reqs, chunked, last.chunked_req)
    return found


def described(s: Any) -> str:
    """The queues and the pool of a scheduler, for people."""
    ready, flights = s.cooperation._ready, s.cooperation._flights
    return (
        f"running {[r.rid for r in s.running_batch.reqs]}, "
        f"waiting {[r.rid for r in s.waiting_queue]}, chunked {s.chunked_req}, "
        f"full {s.running_batch.batch_is_full}, cooperating {s.engine.cooperating}, "
        f"ready {[r.rid for r in ready.reqs]}, in flight {len(flights)}, "
        f"free {s.token_to_kv_pool_allocator.available_size()} of "
        f"{s.token_to_kv_pool_allocator.size}, cached {s.tree_cache.evictable_size()}"
    )


def cached_blocks(tree: Any) -> set[int]:
    """The blocks of all sequences in a radix tree, each hashed from its beginning."""
    found: set[int] = set()
    paths = [(node, array("q")) for node in tree.root_node.children.values()]
    while paths:
        node, before = paths.pop()
        sequence = before + node.key.raw_token_ids()
        found.update(block_hashes(sequence, node.key.extra_key))
        paths += [(child, sequence) for child in node.children.values()]
    return found
