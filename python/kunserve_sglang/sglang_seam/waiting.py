"""Which waiting requests SGLang gets to see when it looks for new work."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kunserve_sglang.sglang_seam.lengths import needed_to_admit

if TYPE_CHECKING:
    from kunserve_sglang.sglang_seam.scheduler import KunServeScheduler


class WaitingRequests:
    """Keeps what cannot run now from holding up the others.

    Upstream's queue has no request that is larger than the pool, since it refuses them. Here one
    may wait for a drop; the queue behind it goes on meanwhile.
    """

    def __init__(self, scheduler: KunServeScheduler) -> None:
        self._scheduler = scheduler
        self._seen: object = None

    @contextlib.contextmanager
    def admissible(self, running: Any) -> Iterator[None]:
        """Let SGLang see, and admit from, the waiting requests that it could run now.

        Not those that are too large, and while some are tried apart, none but these.
        """
        scheduler = self._scheduler
        if self._situation(running) != self._seen:
            running.batch_is_full = False
        scheduler.containment.look_again()
        whole = scheduler.waiting_queue
        aside = set() if running.batch_is_full else {r for r in whole if not self.may_run(r)}
        if aside:
            scheduler.waiting_queue = [r for r in whole if r not in aside]
        try:
            yield
        finally:
            if aside:
                scheduler.waiting_queue = _in_order(scheduler.waiting_queue, aside, whole)
            self._seen = self._situation(running)

    def may_run(self, request: Any) -> bool:
        """Whether SGLang gets to see it."""
        return self.fits(request) and self._scheduler.containment.may_run(request)

    def fits(self, request: Any) -> bool:
        """Whether SGLang would admit it if nothing else were in the pool."""
        scheduler = self._scheduler
        cached = not getattr(scheduler.tree_cache, "disable", True)  # as SGLang asks
        needed = needed_to_admit(request, cached=cached)
        return bool(needed < scheduler.token_to_kv_pool_allocator.size)

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
    merged, there = list(queue), set(queue)
    follower = None
    for request in reversed(before):
        if request in aside:
            merged.insert(len(merged) if follower is None else merged.index(follower), request)
        if request in aside or request in there:
            follower = request
    return merged
