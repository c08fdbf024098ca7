"""A short run of what strangers may send, and that what it counts as a fault is counted."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from benchmark.hostile import noise, raw_http
from benchmark.hostile.parts import PARTS, Sizes, checks_of
from benchmark.hostile.raw import is_odd
from benchmark.hostile.raw_http import TEMPLATES, End, Outcome, exchange, mutated
from benchmark.hostile.router import RouterProcess, runtime_folder
from benchmark.hostile.smuggling import Backend, Made, outcomes
from benchmark.hostile.smuggling_corpus import CORPUS
from kunserve_sglang.core.messages import Vote

_SHORT = Sizes(exchanges=2000, requests=400, messages=4000)


@pytest.mark.parametrize("part", ["raw http", "requests", "control messages"])
def test_a_short_run_holds_every_check(part: str) -> None:
    row = asyncio.run(PARTS[part](_SHORT, 7))
    failed = [found for found in checks_of([{"part": part, **row}]) if not found["ok"]]
    assert not failed, row


def test_no_message_of_the_corpus_has_two_meanings() -> None:
    async def run() -> dict[str, Made]:
        backend = await Backend.start()
        with runtime_folder() as folder:
            router = RouterProcess(Path(folder), instances=0)
            await asyncio.to_thread(router.__enter__)
            try:
                await asyncio.to_thread(router.serve_through, backend.worker.url)
                return await outcomes(router.port, backend)
            finally:
                await asyncio.to_thread(router.__exit__)
                await backend.worker.stop()

    made = asyncio.run(run())
    assert len(made) == len(CORPUS)
    assert made["plain"] is Made.SENT_ON
    assert {name: found for name, found in made.items() if not found.safe} == {}


@pytest.mark.parametrize(
    ("answer", "end"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", End.ANSWERED),
        (b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\n\r\n", End.ANSWERED),
        (b"", End.UNANSWERED),
        (None, End.HUNG),
    ],
)
def test_faults_of_a_server_are_seen(
    answer: bytes | None, end: End, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raw_http, "_DEADLINE_S", 0.3)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if answer is None:
            await reader.read()  # until the client gives up
        else:
            writer.write(answer)
        writer.close()

    async def run() -> Outcome:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            return await exchange(server.sockets[0].getsockname()[1], TEMPLATES[0])

    outcome = asyncio.run(run())
    assert outcome.end is end
    assert is_odd(outcome) == (answer is None or b"200" not in answer)


def test_a_seed_repeats_what_is_sent() -> None:
    sent = {mutated(random.Random(f"1/{n}")) for n in range(300)}
    assert sent == {mutated(random.Random(f"1/{n}")) for n in range(300)}
    assert len(sent) > 200
    message = Vote(call=1, epoch=2, ok=True)
    noises = [noise.mutated(message, random.Random(n)) for n in range(300)]
    assert noises == [noise.mutated(message, random.Random(n)) for n in range(300)]
    assert len(set(noises)) > 100
