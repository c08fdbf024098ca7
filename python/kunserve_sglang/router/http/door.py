"""Who comes in: what a request asks for has to be on the list, letter by letter."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from starlette.responses import Response
from starlette.types import Scope

from kunserve_sglang.core.paths import Lookup
from kunserve_sglang.core.routes import Handling, server_routes
from kunserve_sglang.router.http.answers import error_answer

Way = Literal["forward", "answer"]
"""A request goes on to an instance, or to an endpoint of the router."""

_PREFLIGHT = "OPTIONS"
"""Browsers ask before they call from another site; the instance answers that."""

_NO_TARGET = re.compile(rb"[^!-~]|[#\\]")


@dataclass(frozen=True, slots=True)
class _Entry:
    """A path with the methods that it takes; `refusal` says why it takes none."""

    way: Way
    methods: frozenset[str]
    refusal: str = ""


class Door:
    """Sends each request its way, or says why it has none.

    A target has to be in origin form and of visible ASCII, without `#` and backslash: servers may
    cut or turn these before they compare. Its path has to be that of a route as it stands. So what
    is compared here, and what an instance gets, are the same bytes.
    """

    def __init__(
        self,
        endpoints: Iterable[tuple[str, Collection[str]]],
        environment: Mapping[str, str],
    ) -> None:
        """`endpoints` are the router's own: paths and methods. SGLang moves routes by environment
        variables, and `environment` is that of the instances."""
        entries: dict[str, _Entry] = {}
        for path, methods in endpoints:
            known = entries[path].methods if path in entries else frozenset()
            entries[path] = _Entry("answer", known.union(methods))
        for path, route in server_routes(environment).items():
            match route.handling:
                case Handling.FORWARD:
                    methods = frozenset((*route.methods, _PREFLIGHT))
                    entries.setdefault(path, _Entry("forward", methods))
                case Handling.TO_ALL:
                    entries[path] = _Entry("answer", frozenset(route.methods))
                case Handling.REFUSE:
                    entries[path] = _Entry("answer", frozenset(), route.reason)
        self._entries = Lookup(entries.items())

    def way(self, scope: Scope) -> Way | Response:
        """Where a request goes, or the answer to one that goes nowhere: 400, 404, 405, 501."""
        path, query, method = scope["raw_path"], scope["query_string"], scope["method"]
        entry = self._entries.find(path)
        if entry is None:
            if path.startswith(b"/") and not _NO_TARGET.search(path + query):
                return error_answer(404, "not_found", f"{method} {_shown(path)}: no such call")
            return _no_target(path)
        if query and _NO_TARGET.search(query):
            return _no_target(path)
        if method in entry.methods:
            return entry.way
        if entry.refusal:
            message = f"{_shown(path)} is refused: {entry.refusal}"
            return error_answer(501, "not_supported", message)
        allowed = ", ".join(sorted(entry.methods))
        return error_answer(
            405,
            "method_not_allowed",
            f"{method} {_shown(path)}: it takes {allowed}",
            headers={"Allow": allowed},
        )


def _no_target(path: bytes) -> Response:
    message = f"{_shown(path)}: a path in visible ASCII is expected, with no fragment or backslash"
    return error_answer(400, "bad_path", message)


def _shown(path: bytes) -> str:
    """For people, who need not see all of it."""
    return path[:200].decode("ascii", "backslashreplace")
