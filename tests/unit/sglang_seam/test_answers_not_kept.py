"""Answers that others shall not have, or for which there is no room."""

from __future__ import annotations

import random

import msgspec
import pytest
from starlette.responses import Response

from kunserve_sglang.core.kept_answers import AnswerName
from tests.support.kept_answers import NAME, WHOLE, Scene, play, some_turns, soon


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
