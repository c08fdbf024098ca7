"""Bodies and parameters of the admin API, checked before anything happens."""

from __future__ import annotations

import re
from typing import Annotated, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType
from starlette.requests import Request

from kunserve_sglang.messages import TransitionKind
from kunserve_sglang.router.answers import RequestError

Ids = Annotated[list[int], Meta(min_length=1)]
Tokens = Annotated[int, Meta(gt=0)]
Seconds = Annotated[float, Meta(ge=0, le=86_400)]


class Body(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A misspelled field is an error, not a default."""


class RestoreBody(Body, frozen=True, kw_only=True):
    instances: Ids | UnsetType = UNSET


class DropBody(Body, frozen=True, kw_only=True):
    instances: Ids | UnsetType = UNSET
    tokens: Tokens | UnsetType = UNSET


class PlanBody(Body, frozen=True, kw_only=True):
    kind: TransitionKind = TransitionKind.DROP
    instances: Ids | UnsetType = UNSET
    tokens: Tokens | UnsetType = UNSET


class PolicyBody(Body, frozen=True, kw_only=True):
    """What is left out stays as it is."""

    auto: bool | UnsetType = UNSET
    drop: Annotated[float, Meta(gt=0, le=2)] | UnsetType = UNSET
    restore: Annotated[float, Meta(ge=0, lt=2)] | UnsetType = UNSET
    drop_hold_s: Seconds | UnsetType = UNSET
    restore_hold_s: Seconds | UnsetType = UNSET
    cooldown_s: Seconds | UnsetType = UNSET


_B = TypeVar("_B", bound=Body)


async def read_body(request: Request, kind: type[_B]) -> _B:
    """The body as `kind`; an empty one counts as `{}`. Raises `RequestError` (400 or 422)."""
    data = (await request.body()).strip() or b"{}"
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        raise _unfit(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(400, "bad_json", f"the body is no JSON: {error}") from error


def _unfit(text: str) -> RequestError:
    """msgspec says "Expected `int` >= 1 - at `$.tokens`" or "... unknown field `x`"."""
    place = re.search(r"at `\$\.(\w+)", text) or re.search(r"unknown field `([^`]+)`", text)
    field = place[1] if place else "body"
    reason = text.split(" - at ")[0]
    return RequestError(422, "invalid_field", f"{field}: {reason}", field)


def read_limit(request: Request) -> int | None:
    """`?limit=n`, a positive number."""
    text = request.query_params.get("limit")
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and 0 < len(text) < 10 and int(text)):
        raise RequestError(422, "invalid_field", "limit: a positive number is expected", "limit")
    return int(text)


def read_wait(request: Request) -> bool:
    """`?wait=false` or `?wait=true`, which is the default."""
    text = request.query_params.get("wait", "true").lower()
    if text not in ("true", "false", "1", "0"):
        raise RequestError(422, "invalid_field", "wait: true or false is expected", "wait")
    return text in ("true", "1")
