"""All load on one owner of a group: it should get nearly all slots, and give them back after it."""

from __future__ import annotations

import asyncio
from typing import Any

from benchmark.bench import Bench
from benchmark.checks import Section, at_least
from benchmark.control import Control
from benchmark.rounds import fresh, requests, send
from benchmark.workload import Shape

_LOAD = Shape(prompt_len=240, output_len=32)
_COUNT = 44
"""Some 12,000 slots: more than a group of two on the default budget has."""

_MIN_SHARE = 0.9
_POLL_S = 0.1


def measure(bench: Bench) -> Section:
    return bench.by_hand("elastic", _measure)


async def _measure(bench: Bench, cluster: Control) -> Section:
    await cluster.drop()
    await fresh(cluster, requests(bench.prompts, 4, _LOAD))  # warm up
    shares = []
    for owner in (0, 1):
        bench.say(f"elastic: all load on owner {owner}")
        shares.append(await _largest_share(bench, cluster, owner))
    return Section(
        {"largest_share": shares},
        (
            at_least(9, "one busy owner: its share of the group's slots", shares[0], _MIN_SHARE),
            at_least(
                9,
                "then all load on the other: its share, so the first has given back",
                shares[1],
                _MIN_SHARE,
            ),
        ),
    )


async def _largest_share(bench: Bench, cluster: Control, owner: int) -> float:
    """Of the group's slots, while this owner has everything to do."""
    await cluster.forget()
    url = (await cluster.owner_urls())[owner]
    sending = asyncio.create_task(send(url, requests(bench.prompts, _COUNT, _LOAD)))
    largest = 0.0
    try:
        while not sending.done():
            largest = max(largest, share(await cluster.status(), owner))
            await asyncio.sleep(_POLL_S)
    finally:
        sending.cancel()  # without effect on one that has ended
        await asyncio.wait((sending,))
    sending.result()
    return largest


def share(status: dict[str, Any], owner: int) -> float:
    """The part of all slots that one owner has."""
    capacities = [i["slots"]["capacity"] for i in status["instances"]]
    return float(capacities[owner] / sum(capacities))
