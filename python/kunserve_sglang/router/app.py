"""The router as a whole: who answers which request, and what that is made of."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING, Literal

import aiohttp
from starlette.responses import Response

from kunserve_sglang.control.control_plane import ControlPlane
from kunserve_sglang.policy.dispatch import POLICIES
from kunserve_sglang.router.admin.access import Keys
from kunserve_sglang.router.admin.endpoints import OwnEndpoints
from kunserve_sglang.router.admin.failures import failure
from kunserve_sglang.router.http.answers import retry_later
from kunserve_sglang.router.http.asgi import run_asgi
from kunserve_sglang.router.http.client_request import ClientRequest
from kunserve_sglang.router.http.door import Door
from kunserve_sglang.router.http.outbound import InstanceConnections
from kunserve_sglang.router.proxy.dispatcher import Dispatcher
from kunserve_sglang.router.proxy.exchange import Exchanges
from kunserve_sglang.router.proxy.idempotency import IdempotencyKeys
from kunserve_sglang.router.proxy.journal import Journals
from kunserve_sglang.router.proxy.proxy import Proxy
from kunserve_sglang.router.proxy.tenant_use import TenantsFile
from kunserve_sglang.router.proxy.traffic import Traffic
from kunserve_sglang.router.settings import RouterConfig

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from kunserve_sglang.router.proxy.prompts import PromptReader


class RouterApp:
    """Our own calls go to Starlette; those for an instance take the shortest way there."""

    def __init__(
        self, keys: Keys, proxy: Proxy, own: OwnEndpoints, idempotency: IdempotencyKeys
    ) -> None:
        self.routes = own.routes
        endpoints = [(route.path, route.methods or ()) for route in own.routes]
        self._door = Door(endpoints, os.environ)
        self._keys = keys
        self._proxy = proxy
        self._own = own
        self._idempotency = idempotency

    async def __call__(self, request: ClientRequest) -> None:
        try:
            way = self._door.way(request.scope)
            if way != "forward":
                await self._answer(request, way)
            elif (refusal := self._keys.refuse_inference(request)) is not None:
                request.answer(refusal)
            else:
                await self._proxy(request)
        except Exception as error:
            if request.started:
                raise
            logger.exception("%s failed", request.scope["path"])
            request.answer(failure(request.scope, error))

    async def _answer(self, request: ClientRequest, way: Literal["answer"] | Response) -> None:
        """What goes to no instance."""
        if way != "answer":
            request.answer(way)
            return
        if (refusal := self._keys.refuse_reading(request.scope)) is not None:
            request.answer(refusal)
            return
        try:
            await run_asgi(self._own, request)
        except asyncio.CancelledError:
            # Only the end of the router cancels a call; this is for one that has no answer yet.
            if not request.started:
                request.answer(retry_later("router_stopping", "the router is stopping"))

    async def close(self) -> None:
        """To be called when no request is under way any more."""
        await self._idempotency.close()
        await self._own.close()


def build_app(
    config: RouterConfig,
    control: ControlPlane,
    traffic: Traffic,
    session: aiohttp.ClientSession,
    connections: InstanceConnections,
    tenants: TenantsFile | None = None,
    *,
    follows: bool,
) -> RouterApp:
    """`follows` says that there was a router before."""
    # Where nobody should wait behind another's burst, it matters which prompts are ahead.
    reader = _prompt_reader(config, traffic)
    ahead = tenants is not None
    dispatcher = Dispatcher(control.registry, traffic.prefixes, reader, ahead=ahead)
    policy = POLICIES[config.cluster.dispatch]
    journals = Journals(config.cluster.resume_memory, config.instance_admin_key)
    idempotency = IdempotencyKeys(
        control.registry, session, config.instance_admin_key, follows=follows
    )
    exchanges = Exchanges(connections, traffic.latency, journals, traffic.moves, idempotency)
    proxy = Proxy(
        control.registry,
        policy,
        traffic.latency,
        traffic.attainment,
        traffic.queue,
        dispatcher,
        journals,
        exchanges,
        idempotency,
    )
    keys = Keys(config, tenants)
    own = OwnEndpoints(config, keys, control, traffic, session, proxy.stats, tenants)
    return RouterApp(keys, proxy, own, idempotency)


def _prompt_reader(config: RouterConfig, traffic: Traffic) -> PromptReader | None:
    """For a router that keeps an index of prefixes; no other loads a tokenizer."""
    if traffic.prefixes is None:
        return None
    from kunserve_sglang.router.proxy.prompts import PromptReader

    return PromptReader(config.prompts)
