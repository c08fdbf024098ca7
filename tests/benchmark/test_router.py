"""The router's benchmark: its load on one event loop, and what it makes of the figures."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest

from benchmark.router_load import BurstClient, Client, MockInstance, StreamClient, Tally
from benchmark.router_report import (
    BEFORE,
    DIRECT,
    OURS,
    THEIRS,
    Case,
    all_checks,
    figures,
    quantile,
    rows_of,
)

C = TypeVar("C", bound=Client)

BOUND_S = 10.0


async def connect(make: Callable[[Tally], C], port: int) -> C:
    loop = asyncio.get_running_loop()
    _, client = await loop.create_connection(lambda: make(Tally()), "127.0.0.1", port)
    return client


def use(make: Callable[[Tally], C], use: Callable[[MockInstance, C], Awaitable[None]]) -> Tally:
    """What one client of a mock instance saw."""

    async def run() -> Tally:
        async with asyncio.timeout(BOUND_S):
            instance = MockInstance()
            await instance.start()
            client = await connect(make, instance.port)
            await use(instance, client)
            return client.tally

    return asyncio.run(run())


async def until(true: Callable[[], bool]) -> None:
    """Lets the event loop go on; `use` bounds it."""
    while not true():  # noqa: ASYNC110 (what a client has seen sets no event)
        await asyncio.sleep(0)


def test_a_client_sends_the_next_request_until_it_is_stopped() -> None:
    async def three(_: MockInstance, client: Client) -> None:
        client.begin()
        await until(lambda: client.tally.answers >= 3)
        await client.stop()

    seen = use(Client, three)
    assert (seen.errors, seen.chunks, seen.ttft) == ([], 0, [])


def test_a_pulled_stream_gets_each_chunk_after_the_one_before() -> None:
    async def five(instance: MockInstance, client: StreamClient) -> None:
        client.begin()
        await until(lambda: client.tally.chunks >= 5)
        assert (len(instance.running), client.tally.answers) == (1, 0)
        await client.stop()
        assert not instance.running

    seen = use(lambda tally: StreamClient(tally, random.Random(1), 500_000, pull=True), five)
    assert (seen.errors, seen.answers, len(seen.ttft)) == ([], 1, 1)


def test_other_streams_go_on_at_the_steps_of_their_instance() -> None:
    async def one(instance: MockInstance, client: StreamClient) -> None:
        client.begin()
        await until(lambda: bool(client.tally.ttft))
        assert (client.tally.chunks, len(instance.running)) == (1, 1)
        steps = asyncio.create_task(instance.run_steps(0.001, 0.0))
        await client.stop()
        steps.cancel()

    seen = use(lambda tally: StreamClient(tally, random.Random(1), 8, pull=False), one)
    assert (seen.errors, seen.answers) == ([], 1)
    assert 4 <= seen.chunks <= 12


def test_a_burst_waits_for_all_its_clients() -> None:
    async def two(_: MockInstance, client: BurstClient) -> None:
        for answers in (1, 2):
            client.begin()
            await client.idle.wait()
            assert client.tally.answers == answers
        await client.stop()

    seen = use(BurstClient, two)
    assert (seen.errors, seen.chunks, len(seen.ttft)) == ([], 2, 2)


def test_an_answer_that_is_none_is_an_error() -> None:
    async def refuse(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n")
        await writer.drain()
        writer.close()

    async def run() -> Tally:
        server = await asyncio.start_server(refuse, "127.0.0.1", 0)
        async with asyncio.timeout(BOUND_S), server:
            client = await connect(Client, server.sockets[0].getsockname()[1])
            client.begin()
            await client.idle.wait()
            return client.tally

    seen = asyncio.run(run())
    assert seen.errors[0].startswith("HTTP/1.1 503")
    assert not seen.answers


def test_quantiles_are_times_that_some_answer_took() -> None:
    values = [5.0, 1.0, 3.0, 2.0, 4.0]
    assert [quantile(values, share) for share in (0.01, 0.5, 0.99)] == [1.0, 3.0, 5.0]
    assert quantile(range(1, 101), 0.99) == 99


def test_figures_are_rates_of_the_clock_and_of_the_routers_cpu_time() -> None:
    tally = Tally(ttft=[0.001, 0.002, 0.003], chunks=600, answers=30)
    assert figures(tally, 2.0, 0.5, 1.0) == {
        "requests_per_s": 15,
        "chunks_per_s": 300,
        "router_busy": 0.25,
        "load_busy": 0.5,
        "ttft_p50_ms": pytest.approx(2),
        "ttft_p99_ms": pytest.approx(3),
        "requests_per_cpu_s": 60,
        "chunks_per_cpu_s": 1200,
    }
    assert "requests_per_cpu_s" not in figures(tally, 2.0, 0.0, 1.0)
    assert "ttft_p50_ms" not in figures(Tally(), 2.0, 0.5, 1.0)


def ttft(p50: float, p99: float) -> dict[str, Any]:
    return {"ttft_p50_ms": p50, "ttft_p99_ms": p99}


def test_what_is_added_is_against_direct_in_the_same_round() -> None:
    rounds = [
        {DIRECT: ttft(1, 10), OURS: ttft(2, 12)},
        {DIRECT: ttft(1, 2), OURS: ttft(2, 5)},
        {DIRECT: ttft(1, 2), OURS: ttft(4, 30)},
    ]
    direct, ours = rows_of(Case("ttft", 32), rounds)
    assert direct == {"what": "ttft", "streams": 32, "through": DIRECT, **ttft(1, 2)}
    assert (ours["added_ttft_p50_ms"], ours["added_ttft_p99_ms"]) == (1, 3)
    assert ours["ttft_p99_ms"] == 12


def test_a_round_too_short_for_a_figure_is_left_out_of_its_median() -> None:
    long, short = (figures(Tally(answers=6), 2.0, cpu, 1.0) for cpu in (0.5, 0.0))
    rounds = [{OURS: short, BEFORE: long}, {OURS: long, BEFORE: short}, {OURS: long, BEFORE: long}]
    ours, before = rows_of(Case("requests", 1), rounds)
    assert (ours["requests_per_cpu_s"], before["requests_per_cpu_s"]) == (12, 12)
    assert ours["requests_per_cpu_s_to_before"] == 1


def rows(share: float, added: float) -> list[dict[str, Any]]:
    """Of a router with `share` of SGLang's throughput that adds `added` ms."""
    found: list[dict[str, Any]] = [
        {"what": "ttft", "streams": 32, "through": OURS, "added_ttft_p99_ms": added}
    ]
    for what in ("chunks", "requests"):
        for through, rate in ((OURS, 1000 * share), (THEIRS, 1000)):
            rates = {f"{what}_per_s": rate, f"{what}_per_cpu_s": rate}
            found.append({"what": what, "streams": 32, "through": through, **rates})
    return found


@pytest.mark.parametrize(
    ("share", "added", "met"),
    [(0.7, 5.0, [True] * 5), (0.69, 5.1, [False] * 5), (1.2, 5.1, [True] * 4 + [False])],
)
def test_checks_hold_throughput_and_latency_to_their_bars(
    share: float, added: float, met: list[bool]
) -> None:
    checks = all_checks(rows(share, added))
    assert [c["ok"] for c in checks] == met
    assert [c["value"] for c in checks] == [share] * 4 + [added]
