"""The audit log: one JSON object a line for every call that changes something, or tries to."""

from __future__ import annotations

import asyncio
import json
import logging
from datetime import UTC, datetime
from typing import Any, TypedDict
from urllib.parse import unquote_plus

import msgspec
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kunserve_sglang.policy.transition_request import Outcome
from kunserve_sglang.router.admin.access import Keys

logger = logging.getLogger("kunserve.audit")

_MAX_BYTES = 16 << 10
"""Of a body, and of an answer: a line must stay a line."""


class _Excerpt:
    """A body as it passes by; None if nobody has read it, a note if it is too long to be kept."""

    def __init__(self) -> None:
        self._data = b""
        self._size = -1

    def add(self, message: Message) -> None:
        chunk = message.get("body", b"")
        self._size = max(self._size, 0) + len(chunk)
        if self._size <= _MAX_BYTES:
            self._data += chunk

    def value(self) -> Any:
        """As JSON types; text that is no JSON as a string."""
        if self._size <= 0:
            return None
        if self._size > _MAX_BYTES:
            return f"[{self._size} bytes]"
        try:
            return msgspec.json.decode(self._data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return self._data.decode(errors="replace")


class _Answered(TypedDict, total=False):
    """What came of a call, as far as there is anything to say."""

    status: int
    result: str | None
    epoch: int | None
    message: str | None


class Audited:
    """ASGI middleware around one endpoint; it sees the answer that errors have been made into."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked_at = datetime.now(UTC)
        asked, answered, status = _Excerpt(), _Excerpt(), 0

        async def hear() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                asked.add(message)
            return message

        async def say(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                answered.add(message)
            await send(message)

        outcome: _Answered = {}
        try:
            await self._app(scope, hear, say)
            outcome = _outcome(status, answered.value())
        except asyncio.CancelledError:
            outcome = {"status": 503, "result": "router_stopping"}
            raise
        except Exception:
            outcome = {"status": 500, "result": "internal_error"}
            raise
        finally:
            self._write(HTTPConnection(scope), asked_at, asked.value(), outcome)

    def _write(
        self, connection: HTTPConnection, time: datetime, body: Any, outcome: _Answered
    ) -> None:
        path, query = connection.scope["path"], connection.scope["query_string"].decode()
        query = f"?{unquote_plus(query)}" if query else ""
        if "message" in outcome:  # the one part that repeats what the caller has sent
            outcome = {**outcome, "message": self._redacted(outcome["message"])}
        line = {
            "time": time.isoformat(timespec="milliseconds"),
            "call": f"{connection.scope['method']} {path}{self._keys.redact(query)}",
            "who": {
                "key": self._keys.holder(connection),
                "address": connection.client.host if connection.client else None,
            },
            "body": self._redacted(body),
            "outcome": outcome,
        }
        logger.info("%s", json.dumps(line))

    def _redacted(self, value: Any) -> Any:
        try:
            return self._keys.redact(value)
        except RecursionError:
            return "[nested too deeply]"


def _outcome(status: int, answer: Any) -> _Answered:
    """`result` in one word: an error's code, how a transition ended, or `ok`."""
    if not isinstance(answer, dict):
        return {"status": status, "result": "ok" if status < 400 else "failed"}
    if status >= 400 and isinstance(error := answer.get("error"), dict):
        return {"status": status, "result": error.get("code"), "message": error.get("message")}
    if answer.get("status") in set(Outcome):
        told: _Answered = {
            "status": status,
            "result": answer["status"],
            "epoch": answer.get("epoch"),
        }
        return {**told, "message": answer["error"]} if answer.get("error") else told
    return {"status": status, "result": "accepted" if status == 202 else "ok"}
