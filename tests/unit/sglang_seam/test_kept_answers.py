"""Answers that are made whether or not anybody waits, and what becomes of them."""

from __future__ import annotations

import asyncio
import random

import msgspec
import pytest

from kunserve_sglang.sglang_seam import transcript
from tests.support.kept_answers import NAME, WHOLE, Scene, eventually, play, soon


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
