"""The parts of the benchmark, what each writes down, and what has to hold."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmark.checks import check
from benchmark.hostile import generated, noise, packets, raw, slow, smuggling
from benchmark.hostile.nginx import nginx, nginx_version
from benchmark.hostile.router import ADMIN_KEY, RouterProcess, runtime_folder
from benchmark.hostile.scene import Scene
from benchmark.routers import UPSTREAM, UpstreamRouter, install_upstream

Row = dict[str, Any]

_WARM_UP = 0.1
"""Share of the exchanges after which memory must not grow any more."""

_MOST_GROWTH_MIB = 8.0
_HELD_MIB = 192.0
"""What the limits of `docs/security.md` let so many slow clients hold."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many of each; the defaults are those of the published run."""

    exchanges: int = 100_000
    requests: int = 20_000
    messages: int = 200_000
    headers: int = 50_000
    rounds: int = 10
    round_seconds: int = 2


async def raw_http(sizes: Sizes, seed: int) -> Row:
    async with _scene() as scene:
        warm = await raw.run(scene, int(sizes.exchanges * _WARM_UP), seed + 1_000_000)
        begin_mib = scene.rss_mib()
        row = await raw.run(scene, sizes.exchanges, seed)
        row["growth_mib"] = round(scene.rss_mib() - begin_mib, 2)
        row["server_errors"] += warm["server_errors"]
        return {**row, **await scene.verdict()}


async def requests(sizes: Sizes, seed: int) -> Row:
    """Half of them without any key that opens something; then nothing may act on an instance."""
    async with _scene() as scene:
        half = sizes.requests // 2
        shut = await _generate(scene, half, seed, "not-the-key")
        without_key = await scene.verdict()
        opened = await _generate(scene, sizes.requests - half, seed + 1, ADMIN_KEY)
        verdict = await scene.verdict()
        return {
            "requests": shut["requests"] + opened["requests"],
            "without_key": shut,
            "with_key": opened,
            **verdict,
            "admin_effects": without_key["admin_effects"],
        }


async def control_messages(sizes: Sizes, seed: int) -> Row:
    async with _scene() as scene:
        half = sizes.messages // 2
        await noise.to_router(scene, int(half * _WARM_UP), seed + 1_000_000)
        begin_mib = scene.rss_mib()
        row = await noise.to_router(scene, half, seed)
        growth = round(scene.rss_mib() - begin_mib, 2)
        read = noise.to_instance(sizes.messages - half, seed)
        verdict = await scene.verdict()
        return {**row, "growth_mib": growth, "by_an_instance": read, **verdict}


async def data_plane(sizes: Sizes, seed: int) -> Row:
    return await asyncio.to_thread(packets.run, sizes.headers, seed)


async def smuggled(_sizes: Sizes, _seed: int) -> Row:
    install_upstream()
    backend = await smuggling.Backend.start()
    cpus = sorted(os.sched_getaffinity(0))
    with runtime_folder() as name, ExitStack() as stack:
        folder = Path(name)
        ours = RouterProcess(folder, instances=0)
        theirs = UpstreamRouter(folder / "theirs.log", cpus, [backend.worker.url])
        for router in (ours, theirs):
            await asyncio.to_thread(stack.enter_context, router)
        await asyncio.to_thread(ours.serve_through, backend.worker.url)
        ports = {
            "kunserve": ours.port,
            UPSTREAM: theirs.port,
            nginx_version(): stack.enter_context(nginx(backend.worker.port, folder)),
        }
        found = {who: await smuggling.outcomes(port, backend) for who, port in ports.items()}
    await backend.worker.stop()
    return smuggling.compare(found)


async def slow_clients(sizes: Sizes, _seed: int) -> Row:
    async with _scene() as quiet, _scene() as crowded:
        row = await slow.run(quiet, crowded, sizes.rounds, sizes.round_seconds)
        return {**row, **await crowded.verdict()}


PARTS: dict[str, Callable[[Sizes, int], Coroutine[Any, Any, Row]]] = {
    "raw http": raw_http,
    "requests": requests,
    "control messages": control_messages,
    "data plane": data_plane,
    "smuggling": smuggled,
    "slow clients": slow_clients,
}


def checks_of(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One for each claim, of the parts that were run."""
    found = []
    for row in rows:
        part = row["part"]

        def holds(what: str, value: float, most: float, part: str = part) -> None:
            found.append(check(f"{part}: {what}", value, most=most))

        if "healthy" in row:
            holds("crashes", float(not row["healthy"]), 0)
            holds("exceptions in the log", row["tracebacks"], 0)
            holds("calls that acted without a key", len(row["admin_effects"]), 0)
            holds("requests that were unreadable behind the router", row["misread"], 0)
        if part == "raw http":
            holds("hangs", row["hung"], 0)
            holds("connections without an answer", row["unanswered"], 0)
            holds("5xx for bad input", row["server_errors"], 0)
        if part == "control messages":
            holds("times the router did not answer", row["times_without_answer"], 0)
        if part == "data plane":
            holds("tests that fail", row["failed"], 0)
        if "growth_mib" in row:
            holds("growth of memory, MiB", row["growth_mib"], _MOST_GROWTH_MIB)
        if part == "smuggling":
            holds("messages sent on with two meanings", row["unsafe"]["kunserve"], 0)
        if part == "slow clients":
            holds("P99 TTFT of others, over without", row["p99_ratio"], 1.2)
            holds("requests of others that failed", row["failures"], 0)
            holds("memory held, MiB", row["held_mib"], _HELD_MIB)
    return found


async def _generate(scene: Scene, count: int, seed: int, key: str) -> Row:
    return await asyncio.to_thread(generated.run, scene.port, count, seed, key)


@asynccontextmanager
async def _scene() -> AsyncIterator[Scene]:
    with runtime_folder() as folder:
        async with Scene(Path(folder)) as scene:
            yield scene
