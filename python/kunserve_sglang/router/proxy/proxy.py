"""Requests to one instance and its answer back, byte by byte as it comes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from dataclasses import dataclass, field

from starlette.responses import Response

from kunserve_sglang.control.liveness import LivenessState
from kunserve_sglang.control.registry import Instance, Registry
from kunserve_sglang.policy.dispatch import Policy, first
from kunserve_sglang.router.http.answers import (
    RequestError,
    error_answer,
    error_event,
    retry_later,
)
from kunserve_sglang.router.http.body_check import check_body
from kunserve_sglang.router.http.client_request import ClientRequest
from kunserve_sglang.router.http.outbound import BrokenOff
from kunserve_sglang.router.proxy.attainment import Attainment
from kunserve_sglang.router.proxy.attempts import Attempts
from kunserve_sglang.router.proxy.busy import BusyAnswer
from kunserve_sglang.router.proxy.dispatcher import Dispatcher, Weight
from kunserve_sglang.router.proxy.exchange import Exchanges
from kunserve_sglang.router.proxy.idempotency import IdempotencyKeys, KeyedRequest
from kunserve_sglang.router.proxy.journal import Journals
from kunserve_sglang.router.proxy.latency import Latency
from kunserve_sglang.router.proxy.priority import TurnedAway
from kunserve_sglang.router.proxy.promise import Promise
from kunserve_sglang.router.proxy.relay import Relay
from kunserve_sglang.router.proxy.request_queue import RequestQueue

logger = logging.getLogger(__name__)

_SAME_EVERYWHERE = frozenset({"/get_model_info", "/model_info", "/v1/models"})

_CLIENT_CLOSED_REQUEST = 499

_NOTICED_S = 3.0
"""After that, an instance whose connection has broken is known to be lost, or is there."""

_AGAIN_S = 0.2
"""How often somebody is looked for who takes a request that has lost its instance."""


@dataclass(slots=True)
class ProxyStats:
    """Counted since start: answers by status, further attempts, streams that went on elsewhere and
    answers that broke off."""

    answers: Counter[int] = field(default_factory=Counter)
    retries: int = 0
    resumed: int = 0
    cut: int = 0


class Proxy:
    """Gives each request to an instance, and its answer back to the client.

    A request goes to another instance if the first cannot have run it (no connection could be made,
    or SGLang had no room for it in its queue), or was lost before its answer was whole: another one
    begins anew, or goes on with a stream. What two instances were lost with is not tried again.
    """

    def __init__(
        self,
        registry: Registry,
        policy: Policy,
        latency: Latency,
        attainment: Attainment,
        queue: RequestQueue,
        dispatcher: Dispatcher,
        journals: Journals,
        exchanges: Exchanges,
        keys: IdempotencyKeys,
    ) -> None:
        self.stats = ProxyStats()
        self._latency = latency
        self._attainment = attainment
        self._registry = registry
        self._policy = policy
        self._queue = queue
        self._dispatcher = dispatcher
        self._journals = journals
        self._exchanges = exchanges
        self._keys = keys
        self._now = time.monotonic

    async def __call__(self, request: ClientRequest) -> None:
        request.arrived = self._latency.clock()
        try:
            promise = Promise(self._attainment, request)
            keyed = self._keys.begin(request)
        except RequestError as error:
            request.answer(error.answer())
            self.stats.answers[request.status] += 1
            return
        promise.begins()
        try:
            await self._serve(request, promise, keyed)
        except asyncio.CancelledError:
            if request.gone:
                self.stats.answers[_CLIENT_CLOSED_REQUEST] += 1
            else:
                self._stopped(request)
        else:
            self.stats.answers[request.status] += 1
        finally:
            self._keys.end(keyed, request)
            promise.ended(request)

    async def _serve(
        self, request: ClientRequest, promise: Promise, keyed: KeyedRequest | None
    ) -> None:
        """Send the request when it is its turn, or say why it is not sent."""
        # Whoever is let in has to go at once, so what takes time comes before.
        try:
            _look_into(request)
            holder = await self._keys.holder(keyed)
        except RequestError as error:
            request.answer(error.answer())
            return
        weight = await self._dispatcher.weigh(request.scope["path"], request.body)
        promise.prompt = weight.prompt_tokens(request.body)
        try:
            if holder is None:  # or it has been let in before
                await self._queue.enter(request, weight)
        except TurnedAway as refusal:
            request.answer(refusal.answer)
            return
        journal = self._journals.of(request)
        try:
            await self._try(request, weight, Attempts(promise, journal, keyed, holder))
        finally:
            if journal is not None:
                journal.close()
            self._queue.leave(request, promise)

    async def _try(self, request: ClientRequest, weight: Weight, attempts: Attempts) -> None:
        """One instance after the other, as the policy chooses, until it has its answer."""
        policy = first if request.scope["path"] in _SAME_EVERYWHERE else self._policy
        while (
            instance := self._next(request, policy, weight, attempts)
        ) is not None or await self._may_come(attempts):
            if instance is None:
                continue
            self.stats.retries += bool(attempts)
            with self._dispatcher.under_way(instance, weight):
                if await self._relay(instance, request, attempts):
                    return
        if request.started:
            self._cut_off(request, attempts)
        else:
            request.answer(self._nobody(request, attempts))

    def _next(
        self, request: ClientRequest, policy: Policy, weight: Weight, attempts: Attempts
    ) -> Instance | None:
        """One that has room, or else any: what was let in once is not held back again."""
        if attempts.exhausted:
            return None
        if (holder := attempts.take_holder()) is not None:
            return holder
        pick, may_try = self._dispatcher.pick, attempts.may_try
        has_room = self._queue.room_for(request)
        roomy = (lambda i: may_try(i) and has_room(i)) if attempts else has_room
        return pick(policy, weight, roomy) or pick(policy, weight, may_try)

    async def _may_come(self, attempts: Attempts) -> bool:
        """Wait a moment for a request that was taken already: it is not turned away so soon."""
        if attempts.since is None or attempts.exhausted:
            return False
        passed = self._now() - attempts.since
        known = self._registry.instances.values()
        there = any(attempts.suits(i) and not (i.liveness.lost or i.draining) for i in known)
        if not there and not self._registry.awaited(doubtful=passed < _NOTICED_S):
            return False
        if passed > self._queue.timeout_s:
            return False
        await asyncio.sleep(_AGAIN_S)
        attempts.look_again()
        return True

    def _nobody(self, request: ClientRequest, attempts: Attempts) -> Response:
        """What a request is told that no instance can answer."""
        if attempts.lost:
            return error_answer(502, "upstream_lost", attempts.why_lost())
        if request.refusal is not None:
            return request.refusal
        known = len(self._registry.instances)
        return retry_later("no_instance", f"none of {known} instances can take requests now")

    async def _relay(self, instance: Instance, request: ClientRequest, attempts: Attempts) -> bool:
        """False if the request has no answer yet, and another instance may be tried.

        Everything that is forwarded only computes an answer, so it does no harm if two do.
        """
        try:
            relay = await self._exchanges.ask(instance, request, attempts)
        except BrokenOff as error:
            return self._lost(instance, request, attempts, error)
        if relay is None or not self._settled(relay, instance, request, attempts):
            attempts.refused_by(instance)
            return False
        self.stats.resumed += attempts.accepted and request.streams
        return True

    def _lost(
        self, instance: Instance, request: ClientRequest, attempts: Attempts, error: BrokenOff
    ) -> bool:
        """Whether that is the end of the request."""
        journal = attempts.journal
        if journal is not None and journal.delivered:
            request.end()
            return True
        if attempts.moving:
            attempts.moved_from(instance, self._now())
            return False
        silent = error.silent or instance.liveness.state is LivenessState.UNREACHABLE
        lose = attempts.vanished_with if silent else attempts.lost_with
        lose(instance, str(error), self._now())
        logger.warning("%s before its answer was whole", attempts.lost[-1])
        if attempts.may_go_on(request):
            return False
        self._cut_off(request, attempts)
        return True

    def _stopped(self, request: ClientRequest) -> None:
        """Only the end of the router cancels a request whose client waits, and after a grace."""
        if not request.started:
            request.answer(retry_later("router_stopping", "the router is stopping"))
            return
        self.stats.cut += 1
        if request.streams:
            path, why = request.scope["path"], "the router is stopping"
            request.write(error_event(path, 503, "router_stopping", why))

    def _cut_off(self, request: ClientRequest, attempts: Attempts) -> None:
        """Too late for another answer: a stream says so, and the connection is closed."""
        self.stats.cut += 1
        if request.streams:
            request.write(attempts.last_event(request))

    def _settled(
        self, relay: Relay, instance: Instance, request: ClientRequest, attempts: Attempts
    ) -> bool:
        """Whether what the instance has said is the end of the request."""
        if relay.unfit:
            attempts.unfit(instance)
        if request.started and not request.ended:
            return False
        if relay.redirect:
            message = f"instance {instance.number} answered with a redirect ({relay.redirect})"
            request.answer(error_answer(502, "instance_failed", message))
        return relay.busy is None or self._refused(relay.busy, request, attempts)

    def _refused(self, busy: BusyAnswer, request: ClientRequest, attempts: Attempts) -> bool:
        """Pass on that the instance is busy, unless another may still have room."""
        request.refusal = busy.response(self._queue.retry_after_s())
        if busy.queue_full or attempts.accepted:
            return False
        request.answer(request.refusal)
        return True


def _look_into(request: ClientRequest) -> None:
    """Nothing else of the body's fields is kept: together they may take more memory than it."""
    stream = check_body(request.scope["path"], request.body).get("stream", False)
    request.wants_stream = stream if isinstance(stream, bool) else None
