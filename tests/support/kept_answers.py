"""An endpoint whose answers are kept, and connections to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

import msgspec
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from kunserve_sglang.core.kept_answers import ANSWER_HEADER, ANSWERS_PATH, AnswerName, KeptAnswer
from kunserve_sglang.sglang_seam.kept_answers import KeptAnswers

KEY = "the admin key"
NAME = AnswerName(key=KEY, name="mine", request="what I ask for")
WHOLE = [b"data: 1\n\n", b"data: 2\n\n", b"data: 3\n\n"]


class Endpoint:
    """A stream whose chunks a test gives; `answer` takes its place if there is one."""

    def __init__(self) -> None:
        self.chunks: asyncio.Queue[bytes] = asyncio.Queue()
        self.bodies: list[bytes] = []
        self.left = 0
        self.answer: Callable[[], Any] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.bodies.append((await receive())["body"])
        answer = self.answer() if self.answer else StreamingResponse(self._stream())
        await answer(scope, receive, send)

    async def _stream(self) -> AsyncIterator[bytes]:
        try:
            while chunk := await self.chunks.get():
                yield chunk
        except asyncio.CancelledError:
            self.left += 1
            raise

    def give(self, *chunks: bytes) -> None:
        for chunk in chunks:
            self.chunks.put_nowait(chunk)


class Connection:
    """One from a router; `lose` is the end of it."""

    def __init__(
        self,
        app: KeptAnswers,
        name: AnswerName | None,
        *,
        path: str = "/generate",
        method: str = "POST",
    ) -> None:
        self.sent: list[Message] = []
        self.reads = asyncio.Event()
        self.reads.set()
        self._lost = asyncio.Event()
        self._body: list[bytes] = [b"half a ", b"body"]
        headers = [] if name is None else [(ANSWER_HEADER, msgspec.json.encode(name))]
        scope = {
            "type": "http",
            "asgi": {"spec_version": "2.3"},
            "method": method,
            "path": path,
            "headers": headers,
        }
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    @property
    def got(self) -> bytes:
        return b"".join(m.get("body", b"") for m in self.sent)

    @property
    def whole(self) -> bool:
        return bool(self.sent) and self.sent[-1].get("more_body") is False

    async def gets(self, expected: bytes) -> None:
        await soon(lambda: self.got == expected)

    async def lose(self) -> None:
        self._lost.set()
        await self.task

    async def _receive(self) -> Message:
        if self._body:
            part = self._body.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(self._body)}
        await self._lost.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        await self.reads.wait()
        self.sent.append({**message, "body": bytes(message.get("body", b""))})


class Scene:
    def __init__(self, **limits: Any) -> None:
        self.endpoint = Endpoint()
        self.app = KeptAnswers(self.endpoint, KEY, **limits)

    def ask(self, name: AnswerName | None = NAME) -> Connection:
        return Connection(self.app, name)

    async def about(self, method: str, name: AnswerName = NAME) -> tuple[int, bytes]:
        connection = Connection(self.app, name, path=ANSWERS_PATH, method=method)
        await connection.task
        return connection.sent[0]["status"], connection.got

    async def knows(self) -> bool:
        status, body = await self.about("GET")
        if status == 404:
            return False
        assert msgspec.json.decode(body, type=KeptAnswer).request == NAME.request
        return True

    async def whole(self, name: AnswerName = NAME) -> Connection:
        connection = self.ask(name)
        self.endpoint.give(*WHOLE, b"")
        await connection.task
        return connection


async def soon(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(20):
        while not await condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def some_turns() -> None:
    """What could happen by itself has happened then."""
    for _ in range(100):
        await asyncio.sleep(0)


def play(scene: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scene)
