"""Requests made from the router's OpenAPI document and from SGLang's routes: right, wrong and odd.

A request of the documented calls has to get a status that the document names, or one of those that
any request may get. None may get a 5xx that is not about the method or the state of the cluster.
"""

from __future__ import annotations

import functools
import http.client
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from benchmark.experiment import RunError
from kunserve_sglang.core.routes import SERVER_ROUTES

_TIMEOUT_S = 20.0
_SLOW_OR_FINAL = frozenset(("trace", "drain"))
"""Calls that take as long as they are told to, or take an instance away."""

_FIELDS = (
    *("text", "prompt", "messages", "input", "input_ids", "sampling_params", "max_new_tokens"),
    *("max_tokens", "max_completion_tokens", "n", "stream", "rid", "priority", "model", "role"),
    *("content", "stop", "tools", "response_format", "temperature", "image_data", "batch"),
)
"""What inference routes look at, or the router does."""

_ODD_TEXTS = (
    *(
        b"",
        b"{",
        b"null",
        b"[]",
        b"NaN",
        b"1e400",
        b"-0",
        b'"\\ud800"',
        b"\xff\xfe{}",
        b"\xef\xbb\xbf{}",
    ),
    *(b'{"text": "a", "text": "b"}', b'{"n": 1' + b"0" * 400 + b"}", b'{"max_tokens": 1e400}'),
    *(b'{"text": "\xc3\x28"}', b'{"messages": [{"role": "user", "content": "\\udfff"}]}'),
    *(b"[" * 20_000, b'{"a":' * 5_000, b'{"stream": true, "max_new_tokens": -1}'),
    *(b'{"text": NaN}', b'{"priority": Infinity}', b'{"prompt": [[1e999]]}', b"\x00" * 100),
)
_EVERYWHERE = frozenset((400, 401, 404, 405, 411, 413, 415, 421, 422, 429, 431, 501))


@dataclass(frozen=True, slots=True)
class _Call:
    """A path to fill in, a method, the schema of its body, and the statuses that it may have."""

    name: str
    path: str
    method: str
    body: Mapping[str, Any] | None
    query: tuple[str, ...]
    statuses: frozenset[int] | None


def run(port: int, count: int, number: int, key: str) -> dict[str, Any]:
    """`count` requests, the same ones for a `number`; some show `key`.

    Raises `RunError` with the smallest one that was not answered well.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)
    document = _document(connection)
    statuses: Counter[str] = Counter()
    schemas = document["components"]["schemas"]
    calls = [*_documented(document), *_of_sglang()]

    @seed(number)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(st.one_of([_request(call, schemas, key) for call in calls]))
    def ask(request: tuple[_Call, str, bytes | None, dict[str, str]]) -> None:
        call, target, body, headers = request
        status = _status(connection, call.method, target, body, headers)
        allowed = None if call.statuses is None else call.statuses | _EVERYWHERE
        statuses[str(status)] += 1
        assert status < 500 or status in (allowed or {501}), f"{status} of {request}"
        assert allowed is None or status in allowed, f"{status} of {request}"

    try:
        ask()
    except AssertionError as error:
        raise RunError(f"a generated request failed: {str(error)[:500]}") from None
    finally:
        connection.close()
    return {"requests": sum(statuses.values()), "calls": len(calls), "statuses": dict(statuses)}


def _document(connection: http.client.HTTPConnection) -> Any:
    connection.request("GET", "/kunserve/openapi.json")
    return json.loads(connection.getresponse().read())


def _documented(document: Mapping[str, Any]) -> list[_Call]:
    calls = []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if operation["operationId"] in _SLOW_OR_FINAL:
                continue
            content = operation.get("requestBody", {}).get("content", {})
            query = [p["name"] for p in operation.get("parameters", ()) if p["in"] == "query"]
            calls.append(
                _Call(
                    operation["operationId"],
                    path,
                    method.upper(),
                    content.get("application/json", {}).get("schema"),
                    tuple(query),
                    frozenset(int(s) for s in operation["responses"]),
                )
            )
    return calls


def _of_sglang() -> list[_Call]:
    inference = {"type": "object", "properties": {name: {} for name in _FIELDS}}
    return [
        _Call(f"{method} {route.path}", route.path, method, inference, (), None)
        for route in SERVER_ROUTES
        for method in route.methods
    ]


def _request(
    call: _Call, schemas: Mapping[str, Any], key: str
) -> st.SearchStrategy[tuple[_Call, str, bytes | None, dict[str, str]]]:
    odd = st.sampled_from(_ODD_TEXTS)
    bodies: st.SearchStrategy[bytes | None] = st.one_of(st.none(), odd)
    if call.body is not None:
        wanted = _of_schema(call.body, schemas) | _anything()
        bodies = wanted.map(lambda value: json.dumps(value).encode()) | bodies
    headers = st.dictionaries(
        st.sampled_from(("Content-Type", "Authorization", "X-Priority", "Accept", "Origin")),
        st.sampled_from(
            (
                *("application/json", "text/plain", "multipart/form-data; boundary=x", ""),
                *(f"Bearer {key}", "Bearer x", "Basic YTpi", "99999999999999999999", "-1"),
                *("null", "http://example.org", "*/*", "\xff"),
            )
        ),
        max_size=3,
    )
    texts = st.text(max_size=20) | st.integers().map(str)
    query = st.dictionaries(st.sampled_from((*call.query, "x")), texts, max_size=2)
    return st.builds(
        lambda body, headers, query, part: (
            call,
            _filled(call.path, part) + (f"?{urlencode(query)}" if query else ""),
            body,
            headers,
        ),
        *(bodies, headers, query, texts),
    )


def _filled(path: str, part: str) -> str:
    before, brace, rest = path.partition("{")
    return before + quote(part, safe="") + rest.partition("}")[2] if brace else path


@functools.cache
def _anything() -> st.SearchStrategy[Any]:
    leaves = (
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text(max_size=20)
        | st.sampled_from((10**400, 2**63, -(2**63) - 1, "\ud800", "x" * 1000))
    )
    return st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(st.sampled_from(_FIELDS), inner, max_size=4)
        ),
        max_leaves=8,
    )


def _of_schema(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    """Values of the kind that the schema names; whether they are within its bounds is chance."""
    if reference := schema.get("$ref"):
        return _of_schema(schemas[reference.rpartition("/")[2]], schemas)
    if choices := schema.get("anyOf"):
        return st.one_of([_of_schema(choice, schemas) for choice in choices])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    kind: str | Sequence[str] | None = schema.get("type")
    if kind == "object":
        properties = {n: _of_schema(s, schemas) for n, s in schema.get("properties", {}).items()}
        return st.fixed_dictionaries({}, optional=properties)
    if kind == "array":
        return st.lists(_of_schema(schema.get("items", {}), schemas), max_size=5)
    of_kind: dict[str, st.SearchStrategy[Any]] = {
        "string": st.text(max_size=30),
        "integer": st.integers(),
        "number": st.floats(),
        "boolean": st.booleans(),
        "null": st.none(),
    }
    return of_kind.get(kind, _anything()) if isinstance(kind, str) else _anything()


def _status(
    connection: http.client.HTTPConnection,
    method: str,
    target: str,
    body: bytes | None,
    headers: Mapping[str, str],
) -> int:
    """Raises `AssertionError` for a connection that ends without an answer, or hangs."""
    try:
        connection.request(method, target, body, headers)
        response = connection.getresponse()
        response.read()
    except (OSError, http.client.HTTPException) as error:
        connection.close()
        raise AssertionError(f"{type(error).__name__} of {method} {target} {body!r}") from error
    return response.status
