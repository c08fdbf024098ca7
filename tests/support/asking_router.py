"""How a router asks an instance for a stream, without HTTP between them."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kunserve_sglang.core.kept_answers import ANSWER_HEADER, AnswerName
from kunserve_sglang.core.resumption import JOURNAL_HEADER, RESUME_HEADER, Resumption
from kunserve_sglang.sglang_seam.journaled_streams import JournaledStreams
from kunserve_sglang.sglang_seam.kept_answers import KeptAnswers
from tests.support.script import Journaled

_KEY = "the router's key"


async def ask_as_router(
    serve: ASGIApp, path: str, body: dict[str, Any], journaled: Journaled, sent: list[Any]
) -> None:
    """`sent` gets the status, and then the body as it goes out."""
    whole, served = json.dumps(body, default=list).encode(), 0
    headers = [(JOURNAL_HEADER, _KEY.encode())]
    if journaled.records:
        resumption = Resumption(len(whole), journaled.delivered)
        headers.append((RESUME_HEADER, msgspec.json.encode(resumption)))
    scope = {"type": "http", "asgi": {"spec_version": "2.4"}, "path": path, "headers": headers}

    async def counted(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal served
        served += 1
        await serve(scope, receive, send)

    app: ASGIApp = JournaledStreams(counted, _KEY)
    if journaled.lost_after:
        name = AnswerName(key=_KEY, name="mine", request="this")
        headers.append((ANSWER_HEADER, msgspec.json.encode(name)))
        app = KeptAnswers(app, _KEY)
        first = _Connection(whole, [], ends_after=journaled.lost_after)
        await app(scope, first.receive, first.send)
    connection = _Connection(whole + journaled.records, sent)
    await app(scope, connection.receive, connection.send)
    assert served == 1


class _Connection:
    """Of a router that ends after so many events, or does not."""

    def __init__(self, body: bytes, sent: list[Any], ends_after: int = 0) -> None:
        self._body: bytes | None = body
        self._sent = sent
        self._ends_after = ends_after
        self._ended = asyncio.Event()

    async def receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body}
        await self._ended.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self._sent.append(message.get("status") or bytes(message["body"]))
        events = b"".join(self._sent[1:]).count(b"\n\n")
        if self._ends_after and events >= self._ends_after:
            self._ended.set()
