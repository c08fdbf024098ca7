"""A load that fits: KunServe has to be as fast as the SGLang that it is built on.

Both clusters are up, and get the same load in turns, so that each is idle while the other works
and both see the same machine. A load is a dozen requests within two seconds, which leaves no core
idle and no pool full; ratios are taken within a turn, and their median counts.

Time to first token is compared for requests that come one at a time. Among a dozen it hangs on
which step of others a request comes in: it differs by a third from request to request, and some
thousands of them would have to be sent to tell a few percent.
"""

from __future__ import annotations

import asyncio

from benchmark.bench import Bench
from benchmark.checks import Check, Section, at_least, at_most
from benchmark.control import Control, control
from benchmark.noise import Noise
from benchmark.rounds import Round, fresh, median, ratio, requests, spread
from benchmark.workload import Request, Shape

SHAPE = Shape(prompt_len=96, output_len=64)
COUNT = 12
_EVERY_S = 0.15
_TURNS = 3
"""Times as many as elsewhere: rounds differ by a tenth, and two hundredths are to be told."""

_ALONE = Shape(prompt_len=96, output_len=4)
_ALONE_EVERY_S = 0.4
_ALONE_TURNS = 4
_UPSTREAM, _OFF, _ON = "upstream", "none", "drop"
_MIN_MARGIN = 0.05
_LEAST, _MOST = 0.98, 1.02


def measure(bench: Bench) -> Section:
    with bench.kunserve("steady-kunserve") as kunserve:
        slots = asyncio.run(_slots_of_each(kunserve.url))
        with bench.upstream(slots) as upstream:
            return asyncio.run(_measure(bench, kunserve.url, upstream.url))


async def _slots_of_each(url: str) -> int:
    async with control(url) as cluster:
        return await cluster.slots_of_each()


async def _measure(bench: Bench, kunserve_url: str, upstream_url: str) -> Section:
    noise = Noise()
    async with control(kunserve_url) as kunserve, control(upstream_url) as upstream:
        for cluster in (kunserve, upstream):
            await fresh(cluster, _load(bench))  # warm up
        rounds = await _in_rounds(bench, kunserve, upstream)
        drops = len(await kunserve.events())
        alone = await _one_at_a_time(bench, kunserve, upstream)
    figures = {
        name: {
            "output_throughput": [r.throughput for r in found],
            "median_ttft_ms": [r.median_ttft_ms for r in found],
            "p99_ttft_ms": [r.p99_ttft_ms for r in found],
            "median_tpot_ms": [r.median_tpot_ms for r in found],
        }
        for name, found in rounds.items()
    }
    about = {"drops": drops, "ttft_ms_one_at_a_time": alone, "noise": noise.share()}
    return Section(figures | about, tuple(_checks(rounds, alone)))


async def _in_rounds(bench: Bench, kunserve: Control, upstream: Control) -> dict[str, list[Round]]:
    """A dozen requests on upstream, on KunServe, and on KunServe with its policy on."""
    rounds: dict[str, list[Round]] = {_UPSTREAM: [], _OFF: [], _ON: []}
    sides = [(_UPSTREAM, upstream), (_OFF, kunserve)]
    for turn in range(_TURNS * bench.repeat):
        bench.say(f"steady: round {turn + 1} of {_TURNS * bench.repeat}")
        load = _load(bench)
        for name, cluster in sides:
            rounds[name].append(await fresh(cluster, load))
        sides.reverse()
        await kunserve.automatic(True)
        rounds[_ON].append(await fresh(kunserve, load))
        await kunserve.automatic(False)
    return rounds


async def _one_at_a_time(
    bench: Bench, kunserve: Control, upstream: Control
) -> dict[str, list[float]]:
    """TTFT of requests that have a cluster for themselves; first on one, then on the other."""
    ttfts: dict[str, list[float]] = {_UPSTREAM: [], _OFF: []}
    sides = [(_UPSTREAM, upstream), (_OFF, kunserve)]
    for turn in range(_ALONE_TURNS * bench.repeat):
        bench.say(f"steady: one at a time, {turn + 1} of {_ALONE_TURNS * bench.repeat}")
        load = requests(bench.prompts, COUNT, _ALONE, every_s=_ALONE_EVERY_S)
        for name, cluster in sides:
            ttfts[name] += (await fresh(cluster, load)).ttfts_ms
        sides.reverse()
    return ttfts


def _load(bench: Bench) -> list[Request]:
    return requests(bench.prompts, COUNT, SHAPE, every_s=_EVERY_S)


def _checks(rounds: dict[str, list[Round]], alone: dict[str, list[float]]) -> list[Check]:
    upstream, off = rounds[_UPSTREAM], rounds[_OFF]
    theirs = [r.p99_ttft_ms for r in upstream]
    margin = max(_MIN_MARGIN, spread(theirs))
    middle = [r.median_ttft_ms for r in upstream]
    among_others = ratio([r.median_ttft_ms for r in off], middle)
    return [
        at_least(
            1,
            "not overloaded: throughput of KunServe / upstream",
            ratio([r.throughput for r in off], [r.throughput for r in upstream]),
            _LEAST,
        ),
        at_most(
            1,
            "not overloaded: P50 TTFT of KunServe / upstream, one request at a time "
            f"(of a dozen: {among_others:.3f}, upstream's rounds differ by "
            f"{spread(middle):.0%})",
            median(alone[_OFF]) / median(alone[_UPSTREAM]),
            _MOST,
        ),
        at_most(
            8,
            "a load that fits: P99 TTFT of all features / upstream "
            f"(margin: how far upstream's rounds differ, at least {_MIN_MARGIN:.0%})",
            ratio([r.p99_ttft_ms for r in rounds[_ON]], theirs),
            1 + margin,
        ),
    ]
