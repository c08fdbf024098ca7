"""Reads bodies and parameters of the admin API; checks them before anything happens."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TypeVar

import msgspec
from starlette.requests import Request

from kunserve_sglang.api.types import DRAIN_TIMEOUT_S, Body, Limit, Seconds, WorkerId
from kunserve_sglang.control.registry import Registry
from kunserve_sglang.router.http.answers import RequestError
from kunserve_sglang.router.http.body_check import check_body

_B = TypeVar("_B", bound=Body)
_T = TypeVar("_T")


async def read_body(request: Request, kind: type[_B]) -> _B:
    """The body as `kind`; an empty one counts as `{}`. Raises `RequestError` (400 or 422)."""
    data = (await request.body()).strip() or b"{}"
    check_body(request.scope["path"], data)
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        raise _unfit(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(400, "bad_json", f"the body is no JSON: {error}") from error


def _unfit(text: str) -> RequestError:
    """msgspec says "Expected `int` >= 1 - at `$.tokens`", or "unknown" or "required field `x`"."""
    place = re.search(r"at `\$\.(\w+)", text) or re.search(
        r"(?:unknown|required) field `([^`]+)`", text
    )
    field = place[1] if place else "body"
    reason = text.split(" - at ")[0]
    return RequestError(422, "invalid_field", f"{field}: {reason}", field)


def read_limit(request: Request) -> int | None:
    """`?limit=n`, a positive number. Raises `RequestError` (422)."""
    text = request.query_params.get("limit")
    return None if text is None else _read("limit", text, Limit, "a positive number")


def read_wait(request: Request) -> bool:
    """`?wait=false` or `?wait=true`, which is the default. Raises `RequestError` (422)."""
    return _read("wait", request.query_params.get("wait", "true"), bool, "true or false")


def read_migrate(request: Request) -> bool:
    """`?migrate=true` or `?migrate=false`, the default. Raises `RequestError` (422)."""
    return _read("migrate", request.query_params.get("migrate", "false"), bool, "true or false")


def read_timeout(request: Request) -> float:
    """`?timeout_s=n`, how long requests under way may take to end. Raises `RequestError` (422)."""
    text = request.query_params.get("timeout_s", str(DRAIN_TIMEOUT_S))
    return _read("timeout_s", text, Seconds, "a number of seconds from 0 to 86400")


def read_worker_id(request: Request) -> int:
    """`{id}` in the path. Raises `RequestError` (422)."""
    return _read("id", request.path_params["id"], WorkerId, "a number")


def _read(name: str, text: str, kind: type[_T], expected: str) -> _T:
    try:
        return msgspec.convert(text, kind, strict=False)
    except msgspec.ValidationError:
        message = f"{name}: {expected} is expected"
        raise RequestError(422, "invalid_field", message, name) from None


def check_instances(registry: Registry, ids: Iterable[int]) -> None:
    """KunServe's own instances, all of them, or `RequestError` (422)."""
    wanted = set(ids)
    if unknown := sorted(wanted - registry.instances.keys()):
        message = f"instances: {unknown} are not known"
        raise RequestError(422, "unknown_instance", message, "instances")
    if plain := sorted(wanted - registry.with_agent()):
        message = f"instances: {plain} are plain SGLang servers, without KunServe"
        raise RequestError(422, "plain_instance", message, "instances")
