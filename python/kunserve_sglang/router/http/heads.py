"""Request lines and headers on their way through, and what HTTP/1.1 says of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from urllib.parse import urlsplit

from starlette.types import Scope

from kunserve_sglang.control.registry import Instance
from kunserve_sglang.control.upstream import target
from kunserve_sglang.core.resumption import JOURNAL_HEADER, RESUME_HEADER

Headers = Sequence[tuple[bytes, bytes]]

BODILESS = frozenset({204, 304})
"""Answers with these statuses end with their headers."""

_HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)

_BODY_EXPECTED = frozenset({"POST", "PUT", "PATCH"})

_OUR_OWN = frozenset({JOURNAL_HEADER, RESUME_HEADER})
"""Between the router and its instances alone."""

# The body has been read and its length is known, and `Host` names whom we talk to.
_NOT_FORWARDED = _HOP_BY_HOP | _OUR_OWN | {b"host", b"content-length", b"expect"}
_NOT_ANSWERED = _HOP_BY_HOP | _OUR_OWN


def request_headers(headers: Headers) -> list[tuple[str, str]]:
    """A client's headers as they go to an instance."""
    return [
        (name.decode("latin-1"), value.decode("utf-8", "surrogateescape"))
        for name, value in _without(headers, _NOT_FORWARDED)
    ]


def request_head(scope: Scope, body: bytes, instance: Instance, further: Headers = ()) -> bytes:
    """A client's request line and headers, and `further` ones, as they go to `instance`.

    Raises `ValueError` as `target` does.
    """
    method, where = scope["method"], target(scope["raw_path"], scope["query_string"])
    lines = [b"%b %b HTTP/1.1\r\nhost: %b\r\n" % (method.encode(), where, _host(instance.url))]
    left_out = _NOT_FORWARDED
    if (key := instance.key) is not None:
        left_out |= {b"authorization"}
        if key:
            lines.append(b"authorization: Bearer %b\r\n" % key.encode())
    lines += [b"%b: %b\r\n" % header for header in _without(scope["headers"], left_out)]
    lines += [b"%b: %b\r\n" % header for header in further]
    if body or method in _BODY_EXPECTED:
        lines.append(b"content-length: %d\r\n" % len(body))
    lines.append(b"\r\n")
    return b"".join(lines)


@cache
def _host(url: str) -> bytes:
    return urlsplit(url).netloc.encode()


def answer_headers(headers: Headers) -> list[tuple[bytes, bytes]]:
    """An instance's headers, names in lower case, as they go to the client."""
    return _without(headers, _NOT_ANSWERED)


def _without(headers: Headers, left_out: frozenset[bytes]) -> list[tuple[bytes, bytes]]:
    for name, value in headers:
        if name == b"connection":
            # This header may name further ones that are meant for one hop only.
            left_out |= {token.strip().lower() for token in value.split(b",")}
    return [pair for pair in headers if pair[0] not in left_out]
