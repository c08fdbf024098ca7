"""Fields of a request that are null and must not be: OpenAI's API means their defaults."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send


def nullless_bodies(app: Starlette) -> dict[str, frozenset[str]]:
    """By path: fields that have a default but take no null, by which OpenAI's API means just it."""
    found: dict[str, frozenset[str]] = {}
    for route in app.routes:
        if isinstance(route, Route):
            for parameter in inspect.signature(route.endpoint).parameters.values():
                body = parameter.annotation
                if isinstance(body, type) and issubclass(body, BaseModel):
                    found[route.path] = frozenset(_nullless_fields(body))
    return found


def _nullless_fields(body: type[BaseModel]) -> Iterable[str]:
    for name, field in body.model_fields.items():
        if field.is_required():
            continue
        annotation: Any = field.annotation
        try:
            TypeAdapter(annotation).validate_python(None)
        except ValidationError:
            yield field.alias or name


class NullsAreDefaults:
    """Leaves out the fields of a body that are null and must not be."""

    def __init__(self, app: ASGIApp, bodies: Mapping[str, frozenset[str]]) -> None:
        self._app = app
        self._bodies = bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        fields = self._bodies.get(scope["path"]) if scope["type"] == "http" else None
        if fields:
            receive = await self._changed(receive, fields)
        await self._app(scope, receive, send)

    async def _changed(self, receive: Receive, fields: frozenset[str]) -> Receive:
        messages: list[Message] = []
        while not messages or messages[-1].get("more_body", False):
            messages.append(await receive())
        body = b"".join(message.get("body", b"") for message in messages)
        if messages[-1]["type"] == "http.request" and b"null" in body:
            whole = {"type": "http.request", "body": _without_nulls(body, fields)}
            messages = [whole]
        waiting = iter(messages)

        async def next_message() -> Message:
            return next(waiting, None) or await receive()

        return next_message


def _without_nulls(body: bytes, fields: frozenset[str]) -> bytes:
    try:
        decoded = json.loads(body)
    except ValueError:
        return body  # the server says what is wrong with it
    if not isinstance(decoded, dict):
        return body
    kept = {k: v for k, v in decoded.items() if v is not None or k not in fields}
    return body if len(kept) == len(decoded) else json.dumps(kept).encode()
