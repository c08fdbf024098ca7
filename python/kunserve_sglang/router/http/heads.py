"""Request lines and headers on their way through, and what HTTP/1.1 says of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from urllib.parse import urlsplit

from starlette.types import Scope

from kunserve_sglang.control.registry import Instance
from kunserve_sglang.control.upstream import target
from kunserve_sglang.core.kept_answers import ANSWER_HEADER
from kunserve_sglang.core.resumption import JOURNAL_HEADER, RESUME_HEADER

Headers = Sequence[tuple[bytes, bytes]]

SHOWN_KEY = "kunserve.key"
"""In a scope: what instances are shown in place of the client's key, which they do not know; empty
for none."""

HEAD_END = b"\r\n"
"""In place of a last line: it ends the line before it, and the empty one after that."""

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

_OUR_OWN = frozenset({ANSWER_HEADER, JOURNAL_HEADER, RESUME_HEADER})
"""Between the router and its instances alone."""

# The body has been read and its length is known, and `Host` names whom we talk to.
_NOT_FORWARDED = _HOP_BY_HOP | _OUR_OWN | {b"host", b"content-length", b"expect"}
_NOT_ANSWERED = _HOP_BY_HOP | _OUR_OWN


def request_headers(headers: Headers) -> list[tuple[str, str]]:
    """A client's headers as they go to an instance."""
    left_out = _with_named(_NOT_FORWARDED, headers)
    return [
        (name.decode("latin-1"), value.decode("utf-8", "surrogateescape"))
        for name, value in headers
        if name not in left_out
    ]


def request_head(scope: Scope, body: bytes, instance: Instance, further: Headers = ()) -> bytes:
    """A client's request line and headers, and `further` ones, as they go to `instance`.

    Raises `ValueError` as `target` does.
    """
    method, where = scope["method"], target(scope["raw_path"], scope["query_string"])
    lines = [b"%b %b HTTP/1.1\r\nhost: %b" % (method.encode(), where, _host(instance.url))]
    left_out = _NOT_FORWARDED
    key = scope.get(SHOWN_KEY) if instance.key is None else instance.key
    if key is not None:
        left_out |= {b"authorization"}
        if key:
            lines.append(b"authorization: Bearer %b" % key.encode())
    left_out = _with_named(left_out, scope["headers"])
    lines += [b": ".join(header) for header in scope["headers"] if header[0] not in left_out]
    lines += [b": ".join(header) for header in further]
    if body or method in _BODY_EXPECTED:
        lines.append(b"content-length: %d" % len(body))
    lines.append(HEAD_END)
    return b"\r\n".join(lines)


@cache
def _host(url: str) -> bytes:
    return urlsplit(url).netloc.encode()


def answer_headers(headers: Headers) -> list[tuple[bytes, bytes]]:
    """An instance's headers, names in lower case, as they go to the client."""
    left_out = _with_named(_NOT_ANSWERED, headers)
    return [header for header in headers if header[0] not in left_out]


def _with_named(left_out: frozenset[bytes], headers: Headers) -> frozenset[bytes]:
    """And those that `Connection` names: they are meant for one hop only, too."""
    for name, value in headers:
        if name == b"connection":
            left_out |= {token.strip().lower() for token in value.split(b",")}
    return left_out
