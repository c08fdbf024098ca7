"""Who may call what: the admin key for changes, and a read key where one is asked for."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from enum import StrEnum
from typing import Any

from starlette.requests import HTTPConnection, Request
from starlette.responses import Response

from kunserve_sglang.api.calls import Access
from kunserve_sglang.router.http.answers import Code, error_answer
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

    def __init__(self, config: RouterConfig) -> None:
        self._admin = config.admin_key
        self._read = config.cluster.read_api_key
        keys = {self._admin, self._read, config.api_key, config.cluster.admin_api_key}
        keys.add(config.instance_admin_key)
        # The longest first, or the rest of a key that begins with another would stay.
        self._secrets = sorted((k for k in keys if k), key=len, reverse=True)

    def needed(self, access: Access) -> tuple[Holder, ...]:
        """Whose keys open such calls, the least powerful first; empty if everybody may call."""
        if access is Access.CHANGE:
            return (Holder.ADMIN,) if self._admin else ()
        return (Holder.READ, Holder.ADMIN) if self._read else ()

    def holder(self, connection: HTTPConnection) -> Holder:
        header = connection.headers.get("authorization", "").encode("latin-1")
        if not header:
            return Holder.NONE
        scheme, _, given = header.partition(b" ")
        if scheme.lower() == b"bearer":
            for key, holder in ((self._admin, Holder.ADMIN), (self._read, Holder.READ)):
                if key and secrets.compare_digest(given, key.encode()):
                    return holder
        return Holder.UNKNOWN

    def open(self, access: Access, connection: HTTPConnection) -> bool:
        """Whether this caller may make such calls."""
        needed = self.needed(access)
        return not needed or self.holder(connection) in needed

    def guard(self, access: Access, endpoint: Endpoint) -> Endpoint:
        """`endpoint` for those who may call it; without a key set, for everybody."""
        needed = self.needed(access)
        if not needed:
            return endpoint

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

    def redact(self, value: Any) -> Any:
        """`value`, made of JSON types, without our keys in any of its texts."""
        if isinstance(value, str):
            for secret in self._secrets:
                value = value.replace(secret, "[key]")
            return value
        if isinstance(value, list):
            return [self.redact(v) for v in value]
        if isinstance(value, dict):
            return {self.redact(k): self.redact(v) for k, v in value.items()}
        return value
