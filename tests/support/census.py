"""Where a scheduler keeps its requests: each unfinished one in one place (invariant 4)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any


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
