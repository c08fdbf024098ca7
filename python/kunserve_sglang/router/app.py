"""All endpoints of the router, and which of SGLang's go to an instance."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import aiohttp
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Scope

from kunserve_sglang.api.calls import CALLS, Access
from kunserve_sglang.control.control_plane import ControlPlane
from kunserve_sglang.control.coordinator import TransitionRunning
from kunserve_sglang.control.draining import DrainTimeout, NotDrained
from kunserve_sglang.control.hub import NoAnswer
from kunserve_sglang.core.routes import SERVER_ROUTES, Handling
from kunserve_sglang.policy.dispatch import POLICIES
from kunserve_sglang.policy.planner import NoPlan
from kunserve_sglang.router.admin.access import Endpoint, Keys
from kunserve_sglang.router.admin.audit import Audited
from kunserve_sglang.router.admin.background import Background
from kunserve_sglang.router.admin.cluster import Admin
from kunserve_sglang.router.admin.dashboard import dashboard_routes
from kunserve_sglang.router.admin.docs import Docs
from kunserve_sglang.router.admin.fanout import Fanout
from kunserve_sglang.router.admin.members import Members
from kunserve_sglang.router.admin.metrics import Metrics
from kunserve_sglang.router.admin.probes import Probes
from kunserve_sglang.router.admin.tracing import TraceRunning, Tracing
from kunserve_sglang.router.http.answers import Code, RequestError, error_answer, retry_later
from kunserve_sglang.router.http.asgi import run_asgi
from kunserve_sglang.router.http.client_request import ClientRequest
from kunserve_sglang.router.http.door import Door
from kunserve_sglang.router.http.outbound import InstanceConnections
from kunserve_sglang.router.proxy.dispatcher import Dispatcher
from kunserve_sglang.router.proxy.proxy import Proxy
from kunserve_sglang.router.proxy.traffic import Traffic
from kunserve_sglang.router.settings import RouterConfig

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from kunserve_sglang.router.proxy.prompts import PromptReader


class RouterApp:
    """Our own calls go to Starlette; those for an instance take the shortest way there."""

    def __init__(self, routes: list[Route], proxy: Proxy, background: Background) -> None:
        self.routes = routes
        endpoints = [(route.path, route.methods or ()) for route in routes]
        self._door = Door(endpoints, os.environ)
        self._proxy = proxy
        self._background = background
        self._starlette = Starlette(
            routes=routes,
            exception_handlers={
                RequestError: _request_error,
                NoPlan: _no_plan,
                TransitionRunning: _transition_running,
                TraceRunning: _trace_running,
                NotDrained: _not_drained,
                NoAnswer: _no_answer,
                HTTPException: _http_error,
                Exception: _internal_error,
            },
        )
        self._starlette.router.redirect_slashes = False

    async def __call__(self, request: ClientRequest) -> None:
        try:
            await self._serve(request)
        except Exception as error:
            logger.exception("%s failed", request.scope["path"])
            if request.started:
                raise
            request.answer(_failure(request.scope, error))

    async def _serve(self, request: ClientRequest) -> None:
        way = self._door.way(request.scope)
        if way == "forward":
            await self._proxy(request)
            return
        if way != "answer":
            request.answer(way)
            return
        try:
            await run_asgi(self._starlette, request)
        except asyncio.CancelledError:
            # Only the end of the router cancels a call; this is for one that has no answer yet.
            if not request.started:
                request.answer(retry_later("router_stopping", "the router is stopping"))

    async def close(self) -> None:
        """To be called when no request is under way any more."""
        await self._background.close()


def build_app(
    config: RouterConfig,
    control: ControlPlane,
    traffic: Traffic,
    session: aiohttp.ClientSession,
    connections: InstanceConnections,
) -> RouterApp:
    keys = Keys(config)
    dispatcher = Dispatcher(control.registry, traffic.prefixes, _prompt_reader(config, traffic))
    policy = POLICIES[config.cluster.dispatch]
    proxy = Proxy(control.registry, connections, policy, traffic.latency, traffic.queue, dispatcher)
    docs = Docs(keys)
    background = Background()
    admin, members = Admin(control, background), Members(control, config, background)
    routes = [
        *_probe_routes(Probes(control.registry, session)),
        *_admin_routes(admin, members, Tracing(control), docs, keys),
        *_fanout_routes(Fanout(control, traffic.prefixes, session, config, keys), keys),
        Route("/docs", docs.page),
        Route("/metrics", Metrics(control, traffic, session, proxy.stats, config.api_key).scrape),
        *dashboard_routes(),
    ]
    return RouterApp(routes, proxy, background)


def _prompt_reader(config: RouterConfig, traffic: Traffic) -> PromptReader | None:
    """For a router that keeps an index of prefixes; no other loads a tokenizer."""
    if traffic.prefixes is None:
        return None
    from kunserve_sglang.router.proxy.prompts import PromptReader

    return PromptReader(config.prompts)


def _probe_routes(probes: Probes) -> list[Route]:
    return [
        Route("/health", probes.health),
        Route("/health_generate", probes.health_generate),
        Route("/liveness", probes.liveness),
        Route("/readiness", probes.readiness),
    ]


def _admin_routes(
    admin: Admin, members: Members, tracing: Tracing, docs: Docs, keys: Keys
) -> list[Route]:
    endpoints: dict[str, Endpoint] = {
        "status": admin.status,
        "plan": admin.plan,
        "drop": admin.drop,
        "restore": admin.restore,
        "policy": admin.policy,
        "set_policy": admin.set_policy,
        "events": admin.events,
        "trace": tracing.record,
        "openapi": docs.openapi,
        "workers": members.workers,
        "add_worker": members.add_worker,
        "join": members.join,
        "drain": members.drain,
    }
    return [
        _guarded(call.path, endpoints[call.name], (call.method,), call.access, keys)
        for call in CALLS
    ]


def _fanout_routes(fanout: Fanout, keys: Keys) -> list[Route]:
    actions = [route for route in SERVER_ROUTES if route.handling is Handling.TO_ALL]
    return [
        *(_guarded(a.path, fanout.to_all, a.methods, Access.CHANGE, keys) for a in actions),
        Route("/get_load", fanout.loads),
        Route("/get_loads", fanout.loads),
        Route("/v1/loads", fanout.loads),
        Route("/get_server_info", fanout.server_info),
        Route("/server_info", fanout.server_info),
        Route("/v1/responses/{response_id}", fanout.by_whoever_knows),
        Route("/v1/responses/{response_id}/cancel", fanout.by_whoever_knows, methods=("POST",)),
    ]


def _guarded(
    path: str, endpoint: Endpoint, methods: Sequence[str], access: Access, keys: Keys
) -> Route:
    """For those who have the key; every change is written down, the refused ones too."""
    return Route(
        path,
        keys.guard(access, endpoint),
        methods=methods,
        middleware=[Middleware(Audited, keys)] if access is Access.CHANGE else None,
    )


async def _request_error(request: Request, error: Exception) -> Response:  # noqa: ARG001
    assert isinstance(error, RequestError)
    return error_answer(error.status, error.code, str(error), field=error.field)


async def _no_plan(request: Request, error: Exception) -> Response:  # noqa: ARG001
    return error_answer(409, "no_plan", str(error))


async def _transition_running(request: Request, error: Exception) -> Response:  # noqa: ARG001
    return error_answer(409, "transition_running", str(error))


async def _trace_running(request: Request, error: Exception) -> Response:  # noqa: ARG001
    return error_answer(409, "trace_running", str(error))


async def _not_drained(request: Request, error: Exception) -> Response:  # noqa: ARG001
    code: Code = "drain_timeout" if isinstance(error, DrainTimeout) else "drain_refused"
    return error_answer(504 if isinstance(error, DrainTimeout) else 409, code, str(error))


async def _no_answer(request: Request, error: Exception) -> Response:  # noqa: ARG001
    return error_answer(504, "no_answer", str(error))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code: Code = "method_not_allowed" if error.status_code == 405 else "not_found"
    message = f"{request.method} {request.scope['path']}: {error.detail}"
    return error_answer(error.status_code, code, message, headers=error.headers)


async def _internal_error(request: Request, error: Exception) -> Response:
    """The bug itself goes to the log."""
    return _failure(request.scope, error)


def _failure(scope: Scope, error: Exception) -> Response:
    message = f"{scope['method']} {scope['path']}: {type(error).__name__} in the router"
    return error_answer(500, "internal_error", message)
