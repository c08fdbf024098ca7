"""The HTTP side of journals: records go out with a stream, and come in with one to be resumed."""

from __future__ import annotations

import hmac
import re
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kunserve_sglang.core.resumption import (
    COMMENT,
    JOURNAL_HEADER,
    NOT_RESUMABLE,
    RESUME_HEADER,
    Resumption,
)
from kunserve_sglang.sglang_seam.journal import CURRENT, OwnerJournal, read_records
from kunserve_sglang.sglang_seam.resuming import JournaledGeneration

_CREATED = re.compile(rb'"created":\s*\d+')

_STATELESS = frozenset({"/generate"})
"""Each event is made of one output alone, so that none has to be made twice."""


class JournaledStreams:
    """Keeps a journal for whoever shows the admin key; for all others it is not there."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = dict(scope["headers"]) if scope["type"] == "http" else {}
        if not hmac.compare_digest(given.get(JOURNAL_HEADER, b""), self._key):
            await self._app(scope, receive, send)
            return
        journal, created = OwnerJournal(), 0
        if RESUME_HEADER in given:
            try:
                order = msgspec.json.decode(given[RESUME_HEADER], type=Resumption)
                body, lines = await _split_body(receive, order.body_bytes)
                journal = OwnerJournal(
                    read_records(lines),
                    skipped=order.events,
                    replays=scope["path"] not in _STATELESS,
                )
            except msgspec.DecodeError as error:
                refusal = JSONResponse({"error": {"message": str(error)}}, status_code=400)
                await refusal(scope, receive, send)
                return
            created, receive = order.created, _given_first(body, receive)
            scope = _with_length(scope, len(body))
        token = CURRENT.set(journal)
        try:
            await self._app(scope, receive, _Stream(journal, created, send))
        finally:
            CURRENT.reset(token)


class _Stream:
    """Puts a journal's records before the events that they belong to."""

    def __init__(self, journal: OwnerJournal, created: int, send: Send) -> None:
        self._journal = journal
        self._created = b'"created":%d' % created if created else b""
        self._send = send
        self._events = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=list(message["headers"]))
            kind = headers.get("content-type", "")
            self._events = message["status"] == 200 and kind.startswith("text/event-stream")
            if self._events:
                headers[JOURNAL_HEADER.decode()] = "1"
                message = {**message, "headers": headers.raw}
        elif self._events and message.get("body"):
            message = {**message, "body": self._whole(bytes(message["body"]))}
        await self._send(message)

    def _whole(self, body: bytes) -> bytes:
        journal = self._journal
        if journal.skipped:
            body = self._undelivered(body)
        if not body:
            return body
        if self._created:
            body = _CREATED.sub(self._created, body)
        records = journal.take() if journal.resumable else [NOT_RESUMABLE]
        return b"".join([b"%b%b\n" % (COMMENT, record) for record in records]) + body

    def _undelivered(self, body: bytes) -> bytes:
        events = body.split(b"\n\n")
        skipped = min(self._journal.skipped, len(events) - 1)
        self._journal.skipped -= skipped
        return b"\n\n".join(events[skipped:])


async def _split_body(receive: Receive, length: int) -> tuple[bytes, bytes]:
    """The client's body, and what comes after it."""
    parts: list[bytes] = []
    more = True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message["type"] == "http.request" and message.get("more_body", False)
    whole = b"".join(parts)
    return whole[:length], whole[length:]


def _given_first(body: bytes, receive: Receive) -> Receive:
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def given() -> Message:
        return waiting.pop() if waiting else await receive()

    return given


def _with_length(scope: Scope, length: int) -> Scope:
    others = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
    return {**scope, "headers": [*others, (b"content-length", b"%d" % length)]}


def keep_journals(app: Starlette, tokenizer_manager: Any, key: str) -> None:
    """Let one server, which has not started to serve, keep journals of its streams."""
    generate = JournaledGeneration(tokenizer_manager, tokenizer_manager.generate_request)
    tokenizer_manager.generate_request = generate
    app.add_middleware(JournaledStreams, key=key)
