"""Which waiting requests SGLang gets to see when it looks for new work."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

from sglang.srt.managers.schedule_batch import FINISH_ABORT

from kunserve_sglang.core.messages import Attainable
from kunserve_sglang.sglang_seam.containment import Containment
from kunserve_sglang.sglang_seam.lengths import needed_to_admit
from kunserve_sglang.sglang_seam.scheduling import Scheduling

REQUEST_TOO_LARGE = "RequestTooLarge"
"""The type of the error that ends a request which no drop has made room for."""

_PATIENCE_S = 10.0


class WaitingRequests:
    """Keeps what cannot run now from holding up the others.

    Upstream's queue has no request that is larger than the pool, since it refuses them. Here one
    may wait for a drop; the queue behind it goes on meanwhile.
    """

    def __init__(self, scheduler: Scheduling, containment: Containment) -> None:
        self._scheduler = scheduler
        self._containment = containment
        self._seen: object = None
        self._told = Attainable(slots=0)
        self._hopeless_since: dict[str, float] = {}
        self._waiting_since: dict[str, float] = {}
        self.limit_prompts()

    @property
    def attainable(self) -> int:
        """Slots that a single request may count on: what is here, or could be had."""
        scheduler = self._scheduler
        had = max(self._told.slots, scheduler.max_total_num_tokens)
        return int(min(had, scheduler.tp_worker.max_slots))

    def limit(self, told: Attainable) -> None:
        """The router says how many slots this instance could get, and whom to admit."""
        self._told = told
        self.limit_prompts()

    def limit_prompts(self) -> None:
        """SGLang refuses prompts that are too long; how long that is has changed."""
        self._scheduler.max_req_input_len = self._scheduler.tp_worker.longest_input(self.attainable)

    @contextlib.contextmanager
    def admissible(self, running: Any) -> Iterator[None]:
        """Let SGLang see, and admit from, the waiting requests that it could run now.

        Not those that are too large, nor those that are late while others are not, nor more of
        the others than may run; and while some are tried apart, none but these.
        """
        scheduler = self._scheduler
        if self._situation(running) != self._seen:
            running.batch_is_full = False
        self._containment.look_again(self.fits)
        whole = scheduler.waiting_queue
        aside = set() if running.batch_is_full else {r for r in whole if not self.may_run(r)}
        if aside:
            aside -= self._turned_away(aside)
            whole = [r for r in whole if not r.finished()]
        late = self._late([r for r in whole if r not in aside])
        if not running.batch_is_full:
            aside |= late
        if aside or len(whole) < len(scheduler.waiting_queue):
            scheduler.waiting_queue = [r for r in whole if r not in aside]
        beyond = self._beyond(scheduler.waiting_queue)
        if beyond:
            scheduler.waiting_queue = scheduler.waiting_queue[: -len(beyond)]
        try:
            yield
        finally:
            if beyond:
                scheduler.waiting_queue = [*scheduler.waiting_queue, *beyond]
            if aside:
                scheduler.waiting_queue = _in_order(scheduler.waiting_queue, aside, whole)
            self._seen = self._situation(running)

    def _beyond(self, queue: list[Any]) -> list[Any]:
        """Those for whom there is no seat beside the requests that run."""
        most = self._told.running
        if not most:
            return []
        return queue[max(0, most - len(self._scheduler.requests_with_slots())) :]

    def _late(self, queue: list[Any]) -> set[Any]:
        """Those that cannot have their first token in time any more, while others can.

        SGLang knows when each has come, but every rank by its own clock, and all have to put off
        the same ones.
        """
        limit, since = self._told.first_token, self._waiting_since
        if not limit.ms or not queue:
            since.clear()
            return set()
        now = self._scheduler.clock()
        self._waiting_since = since = {r.rid: since.get(r.rid, now) for r in queue}
        late = {
            r
            for r in queue
            # Its first token has gone out before it was retracted.
            if not r.output_ids and limit.past(len(r.origin_input_ids), 1e3 * (now - since[r.rid]))
        }
        return late if len(late) < len(queue) else set()

    def may_run(self, request: Any) -> bool:
        """Whether SGLang gets to see it."""
        return self.fits(request) and self._containment.may_run(request)

    def fits(self, request: Any) -> bool:
        """Whether SGLang would admit it if nothing else were in the pool."""
        scheduler = self._scheduler
        cached = not getattr(scheduler.tree_cache, "disable", True)  # as SGLang asks
        needed = needed_to_admit(request, scheduler.page_size, cached=cached)
        return bool(needed < scheduler.token_to_kv_pool_allocator.size)

    def _turned_away(self, aside: set[Any]) -> set[Any]:
        """Those that could run once, and cannot any more: the way to room has been closed.

        Not at once, since it may open again: a limit is about predictions that follow the load.
        """
        scheduler, now = self._scheduler, self._scheduler.clock()
        most = self.attainable - scheduler.page_size
        hopeless = {r.rid: r for r in aside if r.seqlen >= most}
        since = {rid: self._hopeless_since.get(rid, now) for rid in hopeless}
        gone = {r for rid, r in hopeless.items() if now - since[rid] > _PATIENCE_S}
        for request in gone:
            message = (
                f"the request needs more than {request.seqlen} token slots, and no more than "
                f"{self.attainable} can be had for one request now"
            )
            reason = FINISH_ABORT(message, HTTPStatus.SERVICE_UNAVAILABLE, REQUEST_TOO_LARGE)
            request.finished_reason = reason
            self._containment.answer(request, reason)
        self._hopeless_since = {r: t for r, t in since.items() if hopeless[r] not in gone}
        for request in aside - gone:
            if request.rid not in hopeless:
                # As at its arrival: no answer may be longer than there can be slots for.
                scheduler.init_req_max_new_tokens(request)
        return gone

    def _situation(self, running: Any) -> object:
        """What SGLang's memory of being full depends on; it is to look again when this changes.

        It forgets by itself when a running request ends, but not when the request that found no
        room has left the queue, nor when the capacity grows or a prompt in chunks is aborted.
        """
        scheduler = self._scheduler
        queue = scheduler.waiting_queue
        return (
            len(running.reqs),
            len(queue),
            queue[0].rid if queue else None,
            scheduler.chunked_req is None,
            scheduler.token_to_kv_pool_allocator.size,
        )


def _in_order(queue: list[Any], aside: set[Any], before: list[Any]) -> list[Any]:
    """`queue` with those aside in front of whom they were in front of `before`.

    SGLang may have sorted the queue, taken requests out and added others.
    """
    there = set(queue)
    in_front_of: dict[Any, list[Any]] = {}
    passed: list[Any] = []
    for request in before:
        if request in aside:
            passed.append(request)
        elif request in there:
            in_front_of[request], passed = passed, []
    merged: list[Any] = []
    for request in queue:
        merged += [*in_front_of.get(request, ()), request]
    return merged + passed
