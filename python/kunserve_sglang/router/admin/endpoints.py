"""All endpoints that the router answers itself, and the keys that they need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import aiohttp
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from kunserve_sglang.api.calls import CALLS, Access
from kunserve_sglang.control.control_plane import ControlPlane
from kunserve_sglang.core.routes import SERVER_ROUTES, Handling
from kunserve_sglang.router.admin.access import Endpoint, Keys
from kunserve_sglang.router.admin.audit import Audited
from kunserve_sglang.router.admin.background import Background
from kunserve_sglang.router.admin.cluster import Admin
from kunserve_sglang.router.admin.dashboard import dashboard_routes
from kunserve_sglang.router.admin.docs import Docs
from kunserve_sglang.router.admin.failures import FAILURES
from kunserve_sglang.router.admin.fanout import Fanout
from kunserve_sglang.router.admin.members import Members
from kunserve_sglang.router.admin.metrics import Metrics
from kunserve_sglang.router.admin.probes import Probes
from kunserve_sglang.router.admin.tenants import TenantCalls
from kunserve_sglang.router.admin.tracing import Tracing
from kunserve_sglang.router.proxy.proxy import ProxyStats
from kunserve_sglang.router.proxy.tenant_use import TenantsFile
from kunserve_sglang.router.proxy.traffic import Traffic
from kunserve_sglang.router.settings import RouterConfig


class OwnEndpoints:
    """An ASGI application."""

    def __init__(
        self,
        config: RouterConfig,
        keys: Keys,
        control: ControlPlane,
        traffic: Traffic,
        session: aiohttp.ClientSession,
        stats: ProxyStats,
        tenants: TenantsFile | None = None,
    ) -> None:
        self._background = Background()
        admin = Admin(control, self._background)
        members = Members(control, config, self._background)
        docs = Docs(keys)
        self.routes = [
            *_probe_routes(Probes(control.registry, session)),
            *_admin_routes(admin, members, Tracing(control), docs, keys),
            *_tenant_routes(TenantCalls(traffic.queue, tenants), keys),
            *_fanout_routes(Fanout(control, traffic.prefixes, session, config, keys), keys),
            Route("/docs", docs.page),
            Route("/metrics", Metrics(control, traffic, session, stats, config.api_key).scrape),
            *dashboard_routes(),
        ]
        self._starlette = Starlette(routes=self.routes, exception_handlers=dict(FAILURES))
        self._starlette.router.redirect_slashes = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._starlette(scope, receive, send)

    async def close(self) -> None:
        """End what calls have begun. To be called when no request is under way any more."""
        await self._background.close()


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
        "history": admin.history,
        "trace": tracing.record,
        "openapi": docs.openapi,
        "workers": members.workers,
        "add_worker": members.add_worker,
        "join": members.join,
        "drain": members.drain,
    }
    return _routes(endpoints, keys)


def _tenant_routes(calls: TenantCalls, keys: Keys) -> list[Route]:
    return _routes({"tenants": calls.tenants, "reload_tenants": calls.reload}, keys)


def _routes(endpoints: Mapping[str, Endpoint], keys: Keys) -> list[Route]:
    """Those of the table for which there are endpoints here."""
    return [
        _guarded(call.path, endpoints[call.name], (call.method,), call.access, keys)
        for call in CALLS
        if call.name in endpoints
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
