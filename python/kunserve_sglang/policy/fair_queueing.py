"""Whose turn it is among tenants: start-time fair queueing by weight. Pure: time is a number.

Goyal et al. 1996: every tenant has a virtual time at which its next request begins, its last one's
plus that one's cost over the tenant's weight. Whoever begins first goes first, and the system is at
the virtual time of who went last. Whoever begins to wait begins no earlier than that, so a pause
earns nothing. While two tenants wait, what each has had over its weight differs by no more than
their largest requests (`tests/unit/policy/test_fair_queueing.py`).

A cost is what a request is expected to take in tokens; when it has ended, the difference to what it
took is made up for. So it does not matter who asks for more than he needs, or for less.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from kunserve_sglang.core.tenants import Allowance
from kunserve_sglang.policy.queueing import HIGHEST_PRIORITY, WaitingLine

T = TypeVar("T")


class Flow(Generic[T]):
    """One tenant: its requests that wait, the number and tokens of those under way.

    Its next one begins at `begins`, in virtual time.
    """

    __slots__ = ("allowance", "begins", "requests", "tokens", "waiting")

    def __init__(self, allowance: Allowance) -> None:
        self.allowance = allowance
        self.waiting: WaitingLine[T] = WaitingLine(math.inf)
        self.requests = 0
        self.tokens = 0
        self.begins = 0.0

    @property
    def full(self) -> bool:
        """Whether no more of it may wait."""
        limit = self.allowance.max_queued
        return limit is not None and len(self.waiting) >= limit

    @property
    def active(self) -> bool:
        return bool(self.requests or len(self.waiting))

    def within(self, tokens: int) -> bool:
        """Whether its own limits allow so many tokens more; alone a request may have any number."""
        allowance = self.allowance
        if allowance.max_requests is not None and self.requests >= allowance.max_requests:
            return False
        most = allowance.max_tokens
        return most is None or not self.requests or self.tokens + tokens <= most


class FairLine(Generic[T]):
    """Requests of several tenants; within one, priority and age decide as in `WaitingLine`.

    Whoever is served is counted as under way until `ended`.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._flows: list[Flow[T]] = []
        self._places: dict[T, tuple[Flow[T], int]] = {}
        self._tokens = 0
        self._now = 0.0

    def __len__(self) -> int:
        return len(self._places)

    def add(self, allowance: Allowance) -> Flow[T]:
        """A tenant more."""
        flow: Flow[T] = Flow(allowance)
        flow.begins = self._now
        self._flows.append(flow)
        return flow

    def remove(self, flow: Flow[T]) -> None:
        """A tenant less, that has nothing waiting and nothing under way."""
        self._flows.remove(flow)

    def join(self, flow: Flow[T], item: T, tokens: int, priority: int, now: float) -> T | None:
        """Add `item`; returns who is turned away for it, which may be `item` itself.

        Where a tenant has too many waiting, it is one of its own. Where all have, it is the
        youngest of the lowest priority of whoever has most waiting for its weight.
        """
        turned_away = None
        if flow.full:
            turned_away = flow.waiting.youngest(below=priority)
        elif len(self) >= self._limit:
            turned_away = self._of_the_longest(flow, priority)
        if turned_away is not None:
            self.leave(turned_away)
        elif flow.full or len(self) >= self._limit:
            return item
        if not len(flow.waiting):
            flow.begins = max(flow.begins, self._now)
        flow.waiting.join(item, priority, now)
        self._places[item] = flow, tokens
        return turned_away

    def leave(self, item: T) -> None:
        """Take `item` out, if it is still there."""
        place = self._places.pop(item, None)
        if place is not None:
            place[0].waiting.leave(item)

    def take(self, may_go: Callable[[Flow[T]], bool]) -> T | None:
        """Take out and serve whose turn it is, among the tenants for whom there is room."""
        chosen: Flow[T] | None = None
        for flow in self._flows:
            if not len(flow.waiting):
                continue
            if not flow.within(self._next_tokens(flow)):
                # What its own limits keep back does not wait for others, and earns nothing.
                flow.begins = max(flow.begins, self._now)
            elif (chosen is None or flow.begins < chosen.begins) and may_go(flow):
                chosen = flow
        if chosen is None or (item := chosen.waiting.take()) is None:
            return None
        _, tokens = self._places.pop(item)
        self._serve(chosen, tokens)
        return item

    def serve(self, flow: Flow[T], tokens: int) -> None:
        """One that need not wait, of a tenant that has none waiting."""
        flow.begins = max(flow.begins, self._now)
        self._serve(flow, tokens)

    def ended(self, flow: Flow[T], tokens: int, took: int) -> None:
        """A request for which `tokens` were expected took so many."""
        flow.requests -= 1
        flow.tokens -= tokens
        self._tokens -= tokens
        flow.begins += (took - tokens) / flow.allowance.weight

    def weights(self) -> float:
        """What shares of all that is under way are of.

        They are those of tenants who are there now, and of one more: it could come at any moment.
        So a tenant alone has more than its share, and of two that have all between them neither has
        less, so that it is their turns that count.
        """
        weights = largest = 0.0
        for flow in self._flows:
            weight = flow.allowance.weight
            largest = max(largest, weight)
            if flow.requests or len(flow.waiting):
                weights += weight
        return weights + largest

    def has_little(self, flow: Flow[T], weights: float) -> bool:
        """Whether it has less under way than its share; such tenants get what is kept free."""
        return not flow.requests or flow.tokens * weights < flow.allowance.weight * self._tokens

    def ready(self) -> int:
        """How many wait for room alone, and not for what their own limits allow."""
        return sum(self._ready(flow) for flow in self._flows if len(flow.waiting))

    def _ready(self, flow: Flow[T]) -> int:
        most = flow.allowance.max_requests
        if not flow.within(self._next_tokens(flow)):
            return 0
        waiting = len(flow.waiting)
        return waiting if most is None else min(waiting, most - flow.requests)

    def oldest(self) -> float | None:
        """When the one who waits longest arrived."""
        return min(self._arrivals(), default=None)

    def empty(self) -> Iterator[T]:
        """Take out everybody."""
        for item in list(self._places):
            self.leave(item)
            yield item

    def _serve(self, flow: Flow[T], tokens: int) -> None:
        self._now = max(self._now, flow.begins)
        flow.begins += tokens / flow.allowance.weight
        flow.requests += 1
        flow.tokens += tokens
        self._tokens += tokens

    def _next_tokens(self, flow: Flow[T]) -> int:
        if flow.allowance.max_tokens is None:
            return 0
        item = flow.waiting.first()
        return 0 if item is None else self._places[item][1]

    def _of_the_longest(self, flow: Flow[T], priority: int) -> T | None:
        """Whom to turn away; None for the one who comes, of this tenant and priority."""

        def length(one: Flow[T]) -> float:
            return (len(one.waiting) + (one is flow)) / one.allowance.weight

        longest = max(self._flows, key=length)
        if length(flow) >= length(longest):
            return flow.waiting.youngest(below=priority)
        return longest.waiting.youngest(below=HIGHEST_PRIORITY + 1)

    def _arrivals(self) -> Iterator[float]:
        for flow in self._flows:
            if (arrival := flow.waiting.oldest()) is not None:
                yield arrival
