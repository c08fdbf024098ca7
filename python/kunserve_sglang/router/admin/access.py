"""Who may call what: the admin key for changes, and a read key where one is asked for."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from enum import StrEnum
from typing import Any

from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.types import Scope

from kunserve_sglang.api.calls import Access
from kunserve_sglang.router.http.answers import Code, error_answer
from kunserve_sglang.router.http.client_request import ClientRequest
from kunserve_sglang.router.http.heads import SHOWN_KEY
from kunserve_sglang.router.http.sites import Sites
from kunserve_sglang.router.proxy.tenant_use import TenantsFile
from kunserve_sglang.router.settings import RouterConfig

Endpoint = Callable[[Request], Awaitable[Response]]


class Holder(StrEnum):
    """Whose key came with a call; `unknown` is none of ours."""

    ADMIN = "admin"
    READ = "read"
    NONE = "none"
    UNKNOWN = "unknown"


_MISSING: dict[Holder, Code] = {
    Holder.ADMIN: "admin_key_required",
    Holder.READ: "read_key_required",
}


class Keys:
    """The keys of a router: who has shown which, and what it opens."""

    def __init__(self, config: RouterConfig, tenants: TenantsFile | None = None) -> None:
        """The keys of `tenants` open inference, and nothing else."""
        self._tenants = tenants
        self._admin = config.admin_key
        self._read = config.cluster.read_api_key
        self._api = config.api_key
        self._sites = Sites(config.cluster.host, config.cluster.trusted)
        # The longest first, or the rest of a key that begins with another would stay.
        self._secrets = sorted({k for k in config.own_keys if k}, key=len, reverse=True)

    def needed(self, access: Access) -> tuple[Holder, ...]:
        """Whose keys open such calls, the least powerful first; empty if everybody may call."""
        if access is Access.CHANGE:
            return (Holder.ADMIN,) if self._admin else ()
        return (Holder.READ, Holder.ADMIN) if self._read else ()

    def holder(self, connection: HTTPConnection) -> Holder:
        scope = connection.scope
        if not any(name == b"authorization" and value for name, value in scope["headers"]):
            return Holder.NONE
        for key, holder in ((self._admin, Holder.ADMIN), (self._read, Holder.READ)):
            if key and _holds_key(key, scope):
                return holder
        return Holder.UNKNOWN

    def open(self, access: Access, connection: HTTPConnection) -> bool:
        """Whether this caller may make such calls."""
        needed = self.needed(access)
        return not needed or self.holder(connection) in needed

    def guard(self, access: Access, endpoint: Endpoint) -> Endpoint:
        """`endpoint` for those who may call it; without a key, for all but pages of others."""
        needed = self.needed(access)
        if not needed:
            return self._sparing_pages(endpoint) if access is Access.CHANGE else endpoint

        async def guarded(request: Request) -> Response:
            if self.holder(request) in needed:
                return await endpoint(request)
            return error_answer(
                401,
                _MISSING[needed[0]],
                f"this call needs the {' or the '.join(needed)} key: Authorization: Bearer <key>",
                headers={"WWW-Authenticate": "Bearer"},
            )

        return guarded

    def refuse_inference(self, request: ClientRequest) -> Response | None:
        """The answer to a request that must go to no instance; before any work is done for it."""
        tenant = self.tenant(request.scope)
        if tenant is not None:
            # Instances know no tenants, and plain servers need not know their keys.
            request.tenant, request.scope[SHOWN_KEY] = tenant, self._api or ""
            return None
        if not self._api:
            return self._sites.refuse_inference(request)
        if request.scope["method"] == "OPTIONS" or _holds_key(self._api, request.scope):
            return None  # browsers ask without a key whether they may come with one
        return error_answer(
            401,
            "api_key_required",
            "this call needs the API key: Authorization: Bearer <key>",
            headers={"WWW-Authenticate": "Bearer"},
        )

    def tenant(self, scope: Scope) -> str | None:
        """The name of the tenant whose key came with a request."""
        if self._tenants is None:
            return None
        shown = _shown_key(scope)
        return None if shown is None else self._tenants.tenants.holder(shown)

    def refuse_reading(self, scope: Scope) -> Response | None:
        """The answer to a question that some page has a browser ask, where it needs no key."""
        return None if self._read else self._sites.refuse_reading(scope)

    def _sparing_pages(self, endpoint: Endpoint) -> Endpoint:
        async def spared(request: Request) -> Response:
            refusal = self._sites.refuse_change(request.scope, await request.body())
            return refusal or await endpoint(request)

        return spared

    def redact(self, value: Any) -> Any:
        """`value`, made of JSON types, without our keys in any of its texts."""
        if isinstance(value, str):
            for secret in self._secrets:
                value = value.replace(secret, "[key]")
            return value
        if isinstance(value, list):
            return [self.redact(v) for v in value]
        if isinstance(value, dict):
            return {
                self.redact(k): "[key]" if v and k == "api_key" else self.redact(v)
                for k, v in value.items()
            }
        return value


def _holds_key(key: str, scope: Scope) -> bool:
    """Whether a request has come with this key; takes as long for all wrong ones of a length."""
    shown = _shown_key(scope)
    return shown is not None and secrets.compare_digest(shown, key.encode())


def _shown_key(scope: Scope) -> bytes | None:
    given = [value for name, value in scope["headers"] if name == b"authorization"]
    if len(given) != 1:
        return None  # servers differ in which of several they read
    scheme, _, shown = given[0].partition(b" ")
    return shown if scheme.lower() == b"bearer" else None
