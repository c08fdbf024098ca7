"""Answers that are made whether or not anybody waits, and what becomes of them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

import msgspec
import pytest
from starlette.responses import Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from kunserve_sglang.core.kept_answers import ANSWER_HEADER, ANSWERS_PATH, AnswerName, KeptAnswer
from kunserve_sglang.sglang_seam import transcript
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


def test_an_answer_is_made_once_and_given_to_who_comes_later() -> None:
    async def scene() -> None:
        it = Scene()
        first = it.ask()
        it.endpoint.give(*WHOLE[:2])
        await first.gets(b"".join(WHOLE[:2]))
        await first.lose()
        assert not first.whole
        it.endpoint.give(WHOLE[2])  # nobody waits
        second = it.ask()
        await second.gets(b"".join(WHOLE))
        third = it.ask()
        it.endpoint.give(b"")
        await asyncio.gather(second.task, third.task)
        late = it.ask()
        await late.task
        for connection in (second, third, late):
            assert connection.got == b"".join(WHOLE)
            assert connection.whole
        assert it.endpoint.bodies == [b"half a body"]
        assert await it.knows()

    play(scene())


def test_who_comes_in_the_middle_of_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it in order, however much is sent meanwhile."""
    monkeypatch.setattr(transcript, "_PIECE", 100)

    async def scene() -> None:
        it = Scene()
        first, whole = it.ask(), b""
        rng = random.Random(1)
        comers = []
        for _ in range(200):
            chunk = rng.choice((b"z" * 500, rng.randbytes(50), whole[-300:])) or b"a"
            whole += chunk
            it.endpoint.give(chunk)
            if rng.random() < 0.1:
                comers.append(it.ask())
                comers[-1].reads.clear()
            for comer in comers:
                if rng.random() < 0.1:
                    comer.reads.set()
            for _ in range(rng.randrange(4)):
                await asyncio.sleep(0)
        it.endpoint.give(b"")
        for comer in comers:
            comer.reads.set()
        comers.append(it.ask())
        await asyncio.gather(first.task, *(comer.task for comer in comers))
        assert len(comers) > 10
        assert {comer.got for comer in (first, *comers)} == {whole}
        assert await it.knows()

    play(scene())


def test_what_repeats_itself_takes_little() -> None:
    """As streams of `/generate`, whose events have all of the text so far."""

    async def scene() -> None:
        it = Scene()
        rng = random.Random(2)
        text = b"".join(b"%x " % rng.randrange(1 << 20) for _ in range(1000))
        events = [b"data: %b\n\n" % text[: n * 6] for n in range(1000)]
        connection = it.ask()
        it.endpoint.give(*events, b"")
        await connection.task
        assert len(connection.got) > 20 * it.app.used
        late = it.ask()
        await late.task
        assert late.got == b"".join(events)

    play(scene())


def test_a_client_that_has_left_is_waited_for_by_nobody() -> None:
    async def scene() -> None:
        it = Scene()
        first = it.ask()
        it.endpoint.give(WHOLE[0])
        await first.gets(WHOLE[0])
        assert (await it.about("DELETE"))[0] == 200
        await soon(lambda: it.endpoint.left == 1)
        assert not await it.knows()
        assert it.app.used == 0
        second = it.ask()
        it.endpoint.give(WHOLE[1], b"")
        await second.task
        assert second.got == WHOLE[1]
        assert len(it.endpoint.bodies) == 2
        await first.lose()

    play(scene())


def test_that_a_client_has_left_is_nothing_to_a_whole_answer() -> None:
    async def scene() -> None:
        it = Scene()
        await it.whole()
        assert (await it.about("DELETE"))[0] == 200
        assert await it.knows()
        other = msgspec.structs.replace(NAME, name="unknown")
        assert (await it.about("DELETE", other))[0] == 404

    play(scene())


@pytest.mark.parametrize("whole", [True, False])
def test_nobody_is_waited_for_longer_than_that(whole: bool) -> None:
    async def scene() -> None:
        it = Scene(kept_s=0.05)
        connection = it.ask()
        it.endpoint.give(WHOLE[0], *([b""] if whole else []))
        await connection.gets(WHOLE[0])
        await connection.lose()

        async def over() -> bool:
            return not await it.knows()

        await eventually(over)
        await soon(lambda: it.endpoint.left == (not whole))
        assert it.app.used == 0

    play(scene())


def test_one_that_somebody_waits_for_is_not_given_up() -> None:
    async def scene() -> None:
        it = Scene(kept_s=0.02)
        first, second = it.ask(), it.ask()
        await soon(lambda: len(it.endpoint.bodies) == 1)
        await first.lose()
        unheard = msgspec.structs.replace(NAME, name="nobody's")
        await (third := it.ask(unheard)).lose()
        assert not third.whole
        await soon(lambda: it.endpoint.left == 1)
        it.endpoint.give(*WHOLE, b"")
        await second.task
        assert second.got == b"".join(WHOLE)
        assert it.endpoint.left == 1

    play(scene())


def test_the_oldest_whole_answers_make_room() -> None:
    async def scene() -> None:
        it = Scene(limit=30_000)
        it.endpoint.answer = lambda: Response(random.randbytes(5000))
        names = [msgspec.structs.replace(NAME, name=str(n)) for n in range(4)]
        for name in names:
            await it.ask(name).task
            assert it.app.used <= 30_000
        kept = [(await it.about("GET", name))[0] for name in names]
        assert kept == [404, 200, 200, 200]

    play(scene())


@pytest.mark.parametrize("kept", [True, False])
def test_an_answer_is_made_at_the_pace_of_its_client(kept: bool) -> None:
    async def scene() -> None:
        it = Scene(limit=1 << 20 if kept else 200_000)  # most of that is for packing
        connection = it.ask()
        large = [random.randbytes(10_000) for _ in range(9)]
        it.endpoint.give(*large[:8])
        await connection.gets(b"".join(large[:8]))
        assert await it.knows() == kept
        connection.reads.clear()
        it.endpoint.give(*large, b"")
        await soon(lambda: it.endpoint.chunks.qsize() < 10)
        await some_turns()
        assert it.endpoint.chunks.qsize() == 9
        connection.reads.set()
        await connection.task
        assert connection.got == b"".join(large[:8] + large)
        assert await it.knows() == kept

    play(scene())


def test_what_does_not_fit_ends_with_its_connection() -> None:
    async def scene() -> None:
        it = Scene(limit=0)
        connection = it.ask()
        it.endpoint.give(WHOLE[0])
        await connection.gets(WHOLE[0])
        await connection.lose()
        await soon(lambda: it.endpoint.left == 1)

    play(scene())


def test_what_does_not_fit_any_more_is_made_for_nobody() -> None:
    async def scene() -> None:
        it = Scene(limit=200_000)
        connection = it.ask()
        it.endpoint.give(WHOLE[0])
        await connection.gets(WHOLE[0])
        await connection.lose()
        assert await it.knows()
        it.endpoint.give(*(random.randbytes(10_000) for _ in range(9)))
        await soon(lambda: it.endpoint.left == 1)
        assert not await it.knows()
        assert it.app.used == 0

    play(scene())


@pytest.mark.parametrize("status", [400, 429, 500, 503])
def test_what_was_refused_may_be_tried_again(status: int) -> None:
    async def scene() -> None:
        it = Scene()
        it.endpoint.answer = lambda: Response(b"no", status)
        first = it.ask()
        await first.task
        assert (first.sent[0]["status"], first.got) == (status, b"no")
        assert not await it.knows()
        it.endpoint.answer = None
        assert (await it.whole()).got == b"".join(WHOLE)

    play(scene())


@pytest.mark.parametrize("error", [b'data: {"error": {}}\n\n', b"event: error\ndata: {}\n\n"])
def test_a_stream_that_has_failed_may_be_tried_again(error: bytes) -> None:
    async def scene() -> None:
        it = Scene()
        first = it.ask()
        it.endpoint.give(WHOLE[0], error, b"")
        await first.task
        assert first.got == WHOLE[0] + error
        assert first.whole
        assert not await it.knows()
        assert (await it.whole()).got == b"".join(WHOLE)

    play(scene())


def test_a_failure_is_where_it_would_be(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise RuntimeError("a bug")

    async def scene() -> None:
        it = Scene()
        it.endpoint.answer = fail
        with pytest.raises(RuntimeError, match="a bug"):
            await it.ask().task
        assert not await it.knows()
        it.endpoint.answer = None
        connection = it.ask()
        await soon(lambda: len(it.endpoint.bodies) == 2)
        await connection.lose()
        it.endpoint.chunks.put_nowait(17)  # type: ignore[arg-type]
        await soon(lambda: "nobody waits for failed" in caplog.text)
        assert it.app.used == 0

    play(scene())


@pytest.mark.parametrize("name", [None, msgspec.structs.replace(NAME, key="a guess")])
def test_without_the_key_nothing_is_kept_or_told(name: AnswerName | None) -> None:
    async def scene() -> None:
        it = Scene()
        await it.whole()
        connection = it.ask(name)
        it.endpoint.give(WHOLE[0])
        await connection.gets(WHOLE[0])
        await connection.lose()
        await soon(lambda: it.endpoint.left == 1)
        if name is not None:
            it.endpoint.answer = lambda: Response(b"SGLang knows no such path", 404)
            assert (await it.about("GET", name))[1] == b"SGLang knows no such path"
            await it.about("DELETE", name)
        assert await it.knows()

    play(scene())


def test_a_name_that_stands_for_something_else_now() -> None:
    """The router refuses it; should it not know, nobody gets the answer to another question."""

    async def scene() -> None:
        it = Scene()
        await it.whole()
        other = msgspec.structs.replace(NAME, request="something else")
        second = it.ask(other)
        it.endpoint.give(b"another answer", b"")
        await second.task
        assert second.got == b"another answer"
        assert msgspec.json.decode((await it.about("GET"))[1])["request"] == other.request

    play(scene())
