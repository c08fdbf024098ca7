"""The router's queue while tenants share the cluster: whose turn it is, and what each may have."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from typing import cast

from kunserve_sglang.api.tenants import TenantStatus
from kunserve_sglang.api.types import QueueStatus
from kunserve_sglang.control.registry import Instance, Registry
from kunserve_sglang.core.cluster_config import ClusterConfig
from kunserve_sglang.core.load import Load, Slots
from kunserve_sglang.core.tenants import DEFAULT_TENANT, Tenants
from kunserve_sglang.policy.fair_queueing import FairLine, Flow
from kunserve_sglang.policy.shared_room import (
    SharedRoom,
    fits,
    kept_share,
    shared_room,
    short_of_slots,
)
from kunserve_sglang.router.http.client_request import ClientRequest
from kunserve_sglang.router.proxy.dispatcher import Weight
from kunserve_sglang.router.proxy.priority import TurnedAway, read_priority
from kunserve_sglang.router.proxy.promise import Promise
from kunserve_sglang.router.proxy.request_queue import QUESTIONS, RequestQueue, Shed, Waiter
from kunserve_sglang.router.proxy.tenant_use import TenantUse, TenantWaiter

_REFUSED = 400

_NOTHING = Load(slots=Slots(used=0, cached=0, capacity=0), running=0, waiting=0, demand=0)


class TenantQueue(RequestQueue):
    """As `RequestQueue`, but fair between tenants, each of whom stays within its own limits.

    Instances get few requests more than they run (`policy.shared_room`), so that it is this queue
    that decides who is next. Tokens are charged when a request is let in, by its length and the
    longest answer that it asks for, and put right when it has ended.
    """

    def __init__(
        self,
        registry: Registry,
        config: ClusterConfig,
        tenants: Tenants,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(registry, config, clock)
        self._fair: FairLine[TenantWaiter] = FairLine(config.max_queued)
        self._uses: dict[str, TenantUse] = {}
        self._under_way: dict[ClientRequest, TenantWaiter] = {}
        self.apply(tenants)

    def __len__(self) -> int:
        return len(self._fair)

    def apply(self, tenants: Tenants) -> None:
        """From now on there are these. Whoever is not among them any more ends what it has."""
        for name, allowance in tenants.allowances.items():
            use = self._uses.get(name)
            if use is None:
                flow = self._fair.add(allowance)
                self._uses[name] = TenantUse(name, flow, self._clock())
            else:
                use.flow.allowance = allowance
        for name in self._uses.keys() - tenants.allowances.keys():
            use = self._uses.pop(name)
            use.gone = True
            self._forget(use)
        self.let_in()

    def uses(self) -> Collection[TenantUse]:
        return self._uses.values()

    def tenants(self) -> list[TenantStatus]:
        return [use.status() for use in self._uses.values()]

    async def enter(self, request: ClientRequest, weight: Weight) -> None:
        priority = read_priority(request)
        if request.scope["method"] in QUESTIONS:
            return
        use = self._uses.get(request.tenant) or self._uses[DEFAULT_TENANT]
        prompt = weight.prompt_tokens(request.body)
        waiter = TenantWaiter(priority, use, prompt, prompt + weight.output)
        if not self._goes_at_once(waiter):
            await self._wait(waiter)
        use.begun(self._clock())
        self._under_way[request] = waiter

    def leave(self, request: ClientRequest, promise: Promise) -> None:
        waiter = self._under_way.pop(request, None)
        if waiter is None:
            return
        took, use = _took(request, promise, waiter), waiter.use
        self._fair.ended(use.flow, waiter.tokens, took)
        use.ended(self._clock(), waiter.tokens, took)
        self._forget(use)
        super().leave(request, promise)

    def room_for(self, request: ClientRequest) -> Callable[[Instance], bool]:
        waiter = self._under_way.get(request)
        if waiter is None:
            return self.has_room
        kept, tokens = waiter.kept, waiter.tokens
        if waiter.little:
            return lambda instance: self.has_room(instance) and _fits(instance, tokens)
        return lambda instance: self._room(instance, kept).open > 0 and _fits(instance, tokens)

    def has_room(self, instance: Instance) -> bool:
        return self._room(instance, 0.0).most > 0

    def held(self) -> int:
        return self._fair.ready()

    def short(self) -> Collection[int]:
        if not len(self._fair):
            return ()
        kept = self._kept()
        return [
            i.number
            for i in self._available()
            if i.status is not None and short_of_slots(i.status.load, i.in_flight, kept)
        ]

    def let_in(self) -> None:
        if not len(self._fair):
            return
        kept = self._kept()
        room, most = self._rooms(kept)
        weights = self._fair.weights()

        def may_go(flow: Flow[TenantWaiter]) -> bool:
            return room > 0 or self._fair.has_little(flow, weights)

        while most > 0 and (waiter := self._fair.take(may_go)) is not None:
            waiter.little, waiter.kept = room <= 0, kept
            if waiter.decide(None):
                self._leaving += 1
                room, most = room - 1, most - 1
            else:
                self._give_back(waiter)

    def status(self) -> QueueStatus:
        oldest = self._fair.oldest()
        waited = 0.0 if oldest is None else self._clock() - oldest
        return QueueStatus(requests=len(self), oldest_s=round(waited, 3))

    def close(self) -> None:
        self._stopping = True
        for waiter in self._fair.empty():
            waiter.decide(Shed.STOPPING)

    def _goes_at_once(self, waiter: TenantWaiter) -> bool:
        """Whoever waits although there is room is kept back by limits of its own."""
        flow = waiter.use.flow
        if len(flow.waiting) or not flow.within(waiter.tokens):
            return False
        waiter.kept = kept = self._kept()
        if not self._has_open(kept):
            room, most = self._rooms(kept)
            waiter.little = room <= 0
            if waiter.little and (
                most <= 0 or not self._fair.has_little(flow, self._fair.weights())
            ):
                return False
        self._fair.serve(flow, waiter.tokens)
        return True

    async def _wait(self, waiter: Waiter) -> None:
        await super()._wait(waiter)
        if not waiter.verdict.done():  # there was nobody to wait for
            of = cast(TenantWaiter, waiter)
            self._fair.serve(of.use.flow, of.tokens)

    def _join(self, waiter: Waiter, now: float) -> Waiter | None:
        of = cast(TenantWaiter, waiter)
        full = of.use.flow.full
        displaced = self._fair.join(of.use.flow, of, of.tokens, of.priority, now)
        if displaced is of and full:
            of.decide(Shed.TENANT)
        return displaced

    def _drop(self, waiter: Waiter) -> None:
        of = cast(TenantWaiter, waiter)
        self._fair.leave(of)
        self._forget(of.use)

    def _give_back(self, waiter: Waiter) -> None:
        of = cast(TenantWaiter, waiter)
        self._fair.ended(of.use.flow, of.tokens, 0)

    def _turned_away(self, reason: Shed, waiter: Waiter) -> TurnedAway:
        use = cast(TenantWaiter, waiter).use
        use.shed[reason] += 1
        return self._answer(reason, use.retry_after_s(self._clock()))

    def _forget(self, use: TenantUse) -> None:
        """Of a tenant that is gone there is nothing left once its last request has ended."""
        if use.gone and not use.flow.active:
            use.gone = False
            self._fair.remove(use.flow)

    def _kept(self) -> float:
        """Which share of the slots is kept free for tenants who have little under way."""
        now, weights = self._clock(), self._fair.weights()
        reserved = [
            reserve
            for use in self._uses.values()
            if (reserve := use.reserve(now)) and self._fair.has_little(use.flow, weights)
        ]
        loads = [i.status.load for i in self._available() if i.status is not None]
        return kept_share(math.fsum(reserved), sum(load.slots.capacity for load in loads))

    def _room(self, instance: Instance, kept: float) -> SharedRoom:
        load = _load(instance)
        return shared_room(self.given_limit, load, instance.capacity, instance.in_flight, kept)

    def _has_open(self, kept: float) -> bool:
        """Whether there is room for everybody. Most often the first instance has it."""
        if self._leaving:
            return False  # that has to be counted
        return any(self._room(i, kept).open > 0 for i in self._available())

    def _rooms(self, kept: float) -> tuple[float, float]:
        """At all instances, for everybody and for who has little, but for who is just leaving."""
        rooms = [self._room(i, kept) for i in self._available()]
        room = math.fsum(max(0.0, r.open) for r in rooms)
        most = math.fsum(max(0.0, r.most) for r in rooms)
        return room - self._leaving, most - self._leaving


def _load(instance: Instance) -> Load | None:
    """None of a plain server; one of ours that has not reported yet has nothing to do."""
    if instance.status is not None:
        return instance.status.load
    return None if instance.plain else _NOTHING


def _fits(instance: Instance, tokens: int) -> bool:
    """Whether it has slots for so many tokens now, as far as it says."""
    status = instance.status
    return status is None or fits(status.load, instance.in_flight, tokens)


def _took(request: ClientRequest, promise: Promise, waiter: TenantWaiter) -> int:
    """Tokens that were computed for a request, as far as its answer tells."""
    produced = promise.produced
    if produced is not None:
        return waiter.prompt + produced
    if request.status >= _REFUSED:
        return 0
    return waiter.prompt if request.gone else waiter.tokens
