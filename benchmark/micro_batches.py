"""Lookahead batch formation against one micro-batch an owner, in a group of two.

Two clusters that differ in nothing else get the same loads in turns: prompts and decoding mixed on
both owners, for the share of time that stages wait; and everything on one owner, whose peer has
nothing to do but to be its second stage. The mixed load is as much as a group can do, and once more
at half that rate, where stages wait for work that is not there: a figure to read, without a bar.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

from benchmark.bench import Bench, together
from benchmark.checks import Section, at_least, at_most
from benchmark.control import Control, control
from benchmark.noise import Noise
from benchmark.rounds import fresh, median, requests, send
from benchmark.timeline import bubble_fraction, counters
from benchmark.workload import Shape

_MIXED = Shape(prompt_len=256, output_len=48)
_MIXED_COUNT = 36
_BUSY_S, _LIGHTER_S = 0.15, 0.3
"""Between two arrivals."""

_LONE = Shape(prompt_len=128, output_len=48)
_LONE_COUNT = 48
_MAX_BUBBLES = 0.08
_MIN_SPEEDUP = 1.6


def measure(bench: Bench) -> Section:
    look = bench.kunserve("micro-batches-lookahead")
    one = bench.kunserve("micro-batches-one", "--micro-batches", "one")
    with together(look, one):
        return asyncio.run(_measure(bench, look.url, one.url))


async def _measure(bench: Bench, look_url: str, one_url: str) -> Section:
    noise = Noise()
    async with control(look_url) as look, control(one_url) as one:
        for cluster in (look, one):
            await cluster.automatic(False)
            await cluster.drop()
            await fresh(cluster, requests(bench.prompts, 4, _LONE))  # warm up
        bubbles = await _in_turns(bench, "bubbles", partial(_bubbles, _BUSY_S), look, one)
        lighter = await _in_turns(bench, "half", partial(_bubbles, _LIGHTER_S), look, one)
        speeds = await _in_turns(bench, "one busy owner", _lone_throughput, look, one)
    speedup = median([a / b for a, b in zip(*speeds, strict=True)])
    return Section(
        {
            "bubble_fraction": {"lookahead": bubbles[0], "one": bubbles[1]},
            "bubble_fraction_at_half_the_rate": {"lookahead": lighter[0], "one": lighter[1]},
            "lone_output_throughput": {"lookahead": speeds[0], "one": speeds[1]},
            "noise": noise.share(),
        },
        (
            at_most(
                3,
                "bubble fraction, prefill and decode mixed "
                f"(without lookahead: {median(bubbles[1]):.3f}; at half the rate "
                f"{median(lighter[0]):.3f} and {median(lighter[1]):.3f})",
                median(bubbles[0]),
                _MAX_BUBBLES,
            ),
            at_least(4, "one busy owner: throughput / one micro-batch", speedup, _MIN_SPEEDUP),
        ),
    )


async def _in_turns(
    bench: Bench,
    name: str,
    measured: Callable[[Bench, Control], Awaitable[float]],
    *clusters: Control,
) -> list[list[float]]:
    """Half as many rounds as elsewhere: these are long, and each is a mean of many steps."""
    values: list[list[float]] = [[] for _ in clusters]
    rounds = -(-bench.repeat // 2)
    for turn in range(rounds):
        bench.say(f"{name}: round {turn + 1} of {rounds}")
        for found, cluster in zip(values, clusters, strict=True):
            found.append(await measured(bench, cluster))
    return values


async def _bubbles(every_s: float, bench: Bench, cluster: Control) -> float:
    load = requests(bench.prompts, _MIXED_COUNT, _MIXED, every_s=every_s)
    before = counters(await cluster.status())
    await fresh(cluster, load)
    return bubble_fraction(counters(await cluster.status()) - before)


async def _lone_throughput(bench: Bench, cluster: Control) -> float:
    await cluster.forget()
    owner = (await cluster.owner_urls())[0]
    return (await send(owner, requests(bench.prompts, _LONE_COUNT, _LONE))).throughput
