"""Whose web pages may call: any page that a user opens can send requests to servers of this host.

Browsers say where a page comes from, and pages cannot change that: `Origin` with whatever is no
plain GET, `Sec-Fetch-Site` with all requests to this host itself. Other programs send neither. A
name that somebody else lets point to us (DNS rebinding) shows in `Host`, and in `Origin`.

Where a key is asked for, nothing of this is: a page that knows the key may call.
"""

from __future__ import annotations

import socket
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.responses import Response
from starlette.types import Scope

from kunserve_sglang.core.hosts import is_address, is_local
from kunserve_sglang.router.http.answers import error_answer
from kunserve_sglang.router.http.client_request import ClientRequest

ANY_SITE = "*"

_FOREIGN = frozenset({b"cross-site", b"same-site"})
"""Another port of this host is another site to us, and the same one to browsers."""

_BROWSER = b"Mozilla"
"""So all of them begin to name themselves."""


class Sites:
    """Our own names, and those of the hosts that we have been told to trust."""

    def __init__(self, host: str, trusted: Collection[str] = ()) -> None:
        """`host` is the address at which we listen; `*` among the `trusted` stands for all."""
        own = socket.gethostname().lower()
        self._trusted = frozenset(name.lower().rstrip(".") for name in trusted)
        self._names = self._trusted | {host.lower(), own, f"{own}.local", own.partition(".")[0]}

    def refuse_inference(self, request: ClientRequest) -> Response | None:
        """The answer to a request of a foreign page; pages of this host, at any port, may ask.

        A page could fill the queue and read what the model says, but it changes nothing. What comes
        without an `Origin` is from no page, or can neither be read by it nor cost anything, unless
        its name points to us.
        """
        scope = request.scope
        if b"origin" not in request.headers:
            return self.refuse_reading(scope) if scope["method"] == "GET" else None
        origin = next(value for name, value in scope["headers"] if name == b"origin")
        if ANY_SITE in self._trusted or is_local(_host_of(origin)):
            return None
        return None if self._is_own(origin, _by_name(scope)) else _refused(origin)

    def refuse_reading(self, scope: Scope) -> Response | None:
        """The answer to a browser that has been told that somebody's name is ours.

        To it, pages of that name are ours and may read what they like. Other programs may call us
        what they want.
        """
        if ANY_SITE in self._trusted:
            return None
        headers = _by_name(scope)
        if not headers.get(b"user-agent", b"").startswith(_BROWSER):
            return None
        return self._refuse_name(headers)

    def refuse_change(self, scope: Scope, body: bytes) -> Response | None:
        """The answer to a call that could be some page's, and not that of a user of ours."""
        if ANY_SITE in self._trusted:
            return None
        headers = _by_name(scope)
        if (refusal := self._refuse_name(headers)) is not None:
            return refusal
        origin = headers.get(b"origin")
        if origin is not None and not self._is_own(origin, headers):
            return _refused(origin)
        site = headers.get(b"sec-fetch-site")
        trusting = origin is not None and _host_of(origin) in self._trusted
        if site in _FOREIGN and not trusting:
            return _refused(site)
        if origin is None and site is None and headers.get(b"user-agent", b"").startswith(_BROWSER):
            # Browsers name no site to hosts that they reach without TLS.
            return _forbidden("a browser does not say whose page has sent this")
        if body and _media_type(headers) != b"application/json":
            message = "Content-Type: application/json is expected, which foreign pages cannot send"
            return error_answer(415, "not_json", message, field="Content-Type")
        return None

    def _refuse_name(self, headers: dict[bytes, bytes]) -> Response | None:
        host = headers.get(b"host", b"")
        if self._is_known(_host_of(b"//" + host)):
            return None
        return _forbidden(f"Host {_shown(host)}: this router is not known by that name")

    def _is_known(self, host: str) -> bool:
        """An address is nobody's name: nobody else can let it point to us."""
        return host in self._names or is_local(host) or is_address(host)

    def _is_own(self, origin: bytes, headers: dict[bytes, bytes]) -> bool:
        host = _host_of(origin)
        if host in self._trusted:
            return True
        ours = origin.partition(b"://")[2] == headers.get(b"host")
        return ours and self._is_known(host)


def _by_name(scope: Scope) -> dict[bytes, bytes]:
    return {name: value.strip() for name, value in scope["headers"]}


def _media_type(headers: dict[bytes, bytes]) -> bytes:
    return headers.get(b"content-type", b"").partition(b";")[0].strip().lower()


def _host_of(url: bytes) -> str:
    """Empty if there is none, as in the `null` of pages that are nobody's."""
    try:
        return (urlsplit(url.decode("ascii")).hostname or "").rstrip(".")
    except ValueError:
        return ""


def _refused(site: bytes) -> Response:
    return _forbidden(f"a page of another site ({_shown(site)}) may not call this router")


def _forbidden(message: str) -> Response:
    advice = "name it with --trusted-hosts, or ask for a key"
    return error_answer(403, "foreign_site", f"{message}; {advice}")


def _shown(value: bytes) -> str:
    """For people, who need not see all of it."""
    return value[:200].decode("ascii", "backslashreplace")
