"""What the checks of whole instances send to a cluster, and what they wait for there."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import aiohttp

from benchmark.client import LoadGenerator, RequestResult
from benchmark.control import Control
from benchmark.workload import Request, Shape

_POLL_INTERVAL_S = 0.01
_STEPS = 64
_WAIT_S = 30.0
_ANSWER_S = 120.0


def prompt(number: int, length: int) -> list[int]:
    """Tokens that are different for every number."""
    choose = random.Random(number)
    return [choose.randrange(3, 500) for _ in range(length)]


def requests(count: int, shape: Shape, over_s: float = 0.0) -> list[Request]:
    """`count` different requests, all at once or evenly within `over_s` seconds."""
    length, output = shape.prompt_len, shape.output_len
    return [
        Request(n * over_s / count, tuple(prompt(n, length)), length, output) for n in range(count)
    ]


async def load(url: str, count: int, shape: Shape, over_s: float = 0.0) -> list[RequestResult]:
    """Send `requests` and wait for the answers. Raises `AssertionError` if one fails."""
    generator = LoadGenerator(url, timeout_s=_ANSWER_S)
    results = await generator.run(requests(count, shape, over_s))
    failed = [r.error for r in results if not r.ok]
    assert not failed, f"{len(failed)} requests failed: {failed[0]}"
    return results


async def answer(url: str, tokens: list[int], output: int) -> list[int]:
    """The tokens of one greedy answer."""
    sampling = {"max_new_tokens": output, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": tokens, "sampling_params": sampling}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}/generate", json=body) as response,
    ):
        assert response.status == 200, await response.text()
        found: list[int] = (await response.json())["output_ids"]
        return found


async def step_ms(url: str, count: int) -> float:
    """Median time of a token after the first while `count` requests decode together."""
    results = await load(url, count, Shape(16, _STEPS))
    return round(1e3 * statistics.median(r.tpot_s for r in results), 3)


async def until(
    cluster: Control, true: Callable[[dict[str, Any]], bool], limit_s: float = _WAIT_S
) -> dict[str, Any]:
    """The status for which `true` is; raises `AssertionError` if that takes longer."""
    deadline = time.monotonic() + limit_s
    while not true(last := await cluster.status()):
        assert time.monotonic() < deadline, f"not within {limit_s:.0f} s: {last['instances']}"
        await asyncio.sleep(_POLL_INTERVAL_S)
    return last


def running(status: dict[str, Any]) -> int:
    return sum(int(i["running"]) for i in status["instances"])


async def calm(cluster: Control) -> None:
    """All instances are full replicas again, and the policy is off."""
    await cluster.automatic(False)
    status = await until(cluster, lambda s: s["transition"] is None)
    if any(i["mode"] != "independent" for i in status["instances"]):
        await cluster.restore()


async def keep(cluster: Control, count: int) -> None:
    """Only the first `count` instances or servers stay; the others get no requests any more."""
    numbers = [int(i["id"]) for i in (await cluster.status())["instances"]]
    for number in numbers[count:]:
        await cluster.drain(number)
    await until(cluster, lambda s: len(s["instances"]) == count)
