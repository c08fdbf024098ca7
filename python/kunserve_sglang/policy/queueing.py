"""Who waits in the router, in which order, and who is turned away. Pure: time is a number."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Collection
from typing import Generic, TypeVar

import msgspec

from kunserve_sglang.core.load import Load
from kunserve_sglang.policy.state import ClusterState, InstanceState

LOWEST_PRIORITY, HIGHEST_PRIORITY = -10, 10

AGEING_S = 10.0
"""Seconds of waiting that one step of priority is worth."""

READY_REQUESTS = 256
"""Requests that wait at an instance before the router holds any: SGLang orders its queue by
shared prefixes only up to 128, and its next batch should never have to wait for the router."""

_RATE_WINDOW_S = 10.0
_RETRY_AFTER_S = range(1, 61)
"""Clients of OpenAI's SDK do not heed a longer `Retry-After`."""

T = TypeVar("T")


class WaitingLine(Generic[T]):
    """Requests in the order in which they are to be served; every operation takes constant time.

    Higher priorities go first, and one priority in order of arrival. Nobody starves: a request is
    overtaken only by those that arrive within `ageing_s` seconds for each step that they are above
    it. A full line turns away the youngest of the lowest priority.
    """

    def __init__(self, limit: float, ageing_s: float = AGEING_S) -> None:
        self._limit = limit
        self._ageing_s = ageing_s
        # One line for each priority, the times of arrival in it: only their heads are compared.
        self._arrivals: dict[int, OrderedDict[T, float]] = {
            priority: OrderedDict() for priority in range(LOWEST_PRIORITY, HIGHEST_PRIORITY + 1)
        }
        self._priorities: dict[T, int] = {}

    def __len__(self) -> int:
        return len(self._priorities)

    def join(self, item: T, priority: int, now: float) -> T | None:
        """Add `item`; returns who is turned away for it, which may be `item` itself."""
        turned_away = None
        if len(self) >= self._limit:
            turned_away = self.youngest(below=priority)
            if turned_away is None:
                return item
            self.leave(turned_away)
        self._arrivals[priority][item] = now
        self._priorities[item] = priority
        return turned_away

    def leave(self, item: T) -> None:
        """Take `item` out, if it is still there."""
        priority = self._priorities.pop(item, None)
        if priority is not None:
            del self._arrivals[priority][item]

    def take(self) -> T | None:
        """Take out whose turn it is."""
        item = self.first()
        if item is not None:
            self.leave(item)
        return item

    def first(self) -> T | None:
        """Whose turn it is."""
        heads = [
            (arrival - priority * self._ageing_s, -priority, item)
            for priority, line in self._arrivals.items()
            for item, arrival in _head(line)
        ]
        if not heads:
            return None
        return min(heads, key=lambda head: head[:2])[-1]

    def oldest(self) -> float | None:
        """When the one who waits longest arrived."""
        heads = (head for line in self._arrivals.values() for head in _head(line))
        return min((arrival for _, arrival in heads), default=None)

    def youngest(self, below: int) -> T | None:
        """The youngest of the lowest priority, if that is `below` this one."""
        for priority in range(LOWEST_PRIORITY, below):
            if line := self._arrivals[priority]:
                return next(reversed(line))
        return None


def _head(line: OrderedDict[T, float]) -> list[tuple[T, float]]:
    return [next(iter(line.items()))] if line else []


class EndRate:
    """How many requests end in a second, lately: earlier ones count less and less."""

    def __init__(self, began: float) -> None:
        self._began = self._last = began
        self._weight = 0.0

    def ended(self, now: float) -> None:
        self._weight = self._weight_at(now) + 1
        self._last = now

    def per_second(self, now: float) -> float:
        """An average over the time that there has been, if that is short."""
        seconds = _RATE_WINDOW_S * -math.expm1(-max(0.0, now - self._began) / _RATE_WINDOW_S)
        return self._weight_at(now) / seconds if seconds else 0.0

    def _weight_at(self, now: float) -> float:
        return self._weight * math.exp(-max(0.0, now - self._last) / _RATE_WINDOW_S)


def retry_after_s(ahead: int, per_second: float) -> int:
    """Whole seconds until `ahead` requests will have been served at this rate, within bounds."""
    shortest, longest = _RETRY_AFTER_S[0], _RETRY_AFTER_S[-1]
    if ahead >= longest * per_second:
        return longest
    return max(shortest, math.ceil(ahead / per_second))


def in_flight_limit(given: int | None, load: Load | None, full_capacity: int) -> float:
    """How many requests may be under way at an instance before others are held back.

    `given` is for an instance that holds all layers; with more slots in a group it takes more in
    proportion, or dropping would bring nothing. Without `given`, as many may wait there as run
    there, and at least `READY_REQUESTS`: it could then double its batch at once, so that holding
    others back costs no throughput. `load` is None for a plain SGLang server.
    """
    if load is None:
        return math.inf if given is None else given
    if given is None:
        return load.running + max(READY_REQUESTS, load.running)
    return int(given * max(1.0, load.slots.capacity / max(1, full_capacity)))


def with_held(
    state: ClusterState, held: int, plain_slots: int = 0, short: Collection[int] = ()
) -> ClusterState:
    """`state` as the monitor has to see it while the router holds back `held` requests.

    They are divided by capacity, of which `plain_slots` are at plain SGLang servers, and taken to
    need what a request at the instances needs on average, by their own reports. Only instances
    where requests wait get a share: elsewhere those held wait for the limit, not for memory, and no
    drop would let them in. Those that are `short` of memory get one as well, though the router lets
    nobody wait there.
    """
    known = sum(s.load.running + s.load.waiting for s in state.instances)
    slots = state.capacity + plain_slots
    if not held or not known or not slots:
        return state
    seen: list[InstanceState] = []
    before = 0
    for s in state.instances:
        after = before + s.load.slots.capacity
        share = held * after // slots - held * before // slots
        before = after
        if share and (s.load.waiting or s.instance in short):
            load = msgspec.structs.replace(
                s.load,
                waiting=s.load.waiting + share,
                prompts=s.load.prompts + int(share * _prompt(s.load)),
                demand=s.load.demand + share * state.demand // known,
            )
            s = msgspec.structs.replace(s, load=load)
        seen.append(s)
    return ClusterState(instances=tuple(seen), wanted=state.wanted)


def _prompt(load: Load) -> float:
    """Tokens of the mean prompt, of those that wait or else of those that run."""
    if load.waiting:
        return load.prompts / load.waiting
    return max(0, load.slots.used - load.produced) / max(1, load.running)
