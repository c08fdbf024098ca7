"""A load that fits: KunServe has to be as fast as the SGLang that it is built on.

Both clusters are up, and get the same load in turns, so that each is idle while the other works
and both see the same machine. A load is a dozen requests within two seconds, which leaves no core
idle and no pool full; ratios are taken within a turn, and their median counts.
"""

from __future__ import annotations

import asyncio

from benchmark.bench import Bench
from benchmark.checks import Check, Section, at_least, at_most
from benchmark.control import control
from benchmark.noise import Noise
from benchmark.rounds import Round, fresh, ratio, requests, spread
from benchmark.workload import Request, Shape

SHAPE = Shape(prompt_len=96, output_len=64)
COUNT = 12
_EVERY_S = 0.15
_LEAST_MARGIN = 0.05
_LEAST, _MOST = 0.98, 1.02


def measure(bench: Bench) -> Section:
    with bench.kunserve("steady-kunserve") as kunserve:
        slots = asyncio.run(slots_of_each(kunserve.url))
        with bench.upstream(slots) as upstream:
            return asyncio.run(_measure(bench, kunserve.url, upstream.url))


async def slots_of_each(url: str) -> int:
    """KV token slots of one instance, the smallest if they differ."""
    async with control(url) as cluster:
        capacities = [i["slots"]["capacity"] for i in (await cluster.status())["instances"]]
        return int(min(capacities))


async def _measure(bench: Bench, kunserve_url: str, upstream_url: str) -> Section:
    noise = Noise()
    async with control(kunserve_url) as kunserve, control(upstream_url) as upstream:
        for cluster in (kunserve, upstream):
            await fresh(cluster, _load(bench))  # warm up
        rounds: dict[str, list[Round]] = {"upstream": [], "none": [], "drop": []}
        for turn in range(bench.repeat):
            bench.say(f"steady: round {turn + 1} of {bench.repeat}")
            load = _load(bench)
            rounds["upstream"].append(await fresh(upstream, load))
            rounds["none"].append(await fresh(kunserve, load))
            await kunserve.automatic(True)
            rounds["drop"].append(await fresh(kunserve, load))
            await kunserve.automatic(False)
        drops = len(await kunserve.events())
    figures = {
        name: {
            "output_throughput": [r.throughput for r in found],
            "median_ttft_ms": [r.median_ttft_ms for r in found],
            "p99_ttft_ms": [r.p99_ttft_ms for r in found],
            "median_tpot_ms": [r.median_tpot_ms for r in found],
        }
        for name, found in rounds.items()
    }
    return Section({**figures, "drops": drops, "noise": noise.share()}, tuple(_checks(rounds)))


def _load(bench: Bench) -> list[Request]:
    return requests(bench.prompts, COUNT, SHAPE, every_s=_EVERY_S)


def _checks(rounds: dict[str, list[Round]]) -> list[Check]:
    upstream, off = rounds["upstream"], rounds["none"]
    theirs = [r.p99_ttft_ms for r in upstream]
    margin = max(_LEAST_MARGIN, spread(theirs))
    return [
        at_least(
            1,
            "not overloaded: throughput of KunServe / upstream",
            ratio([r.throughput for r in off], [r.throughput for r in upstream]),
            _LEAST,
        ),
        at_most(
            1,
            "not overloaded: P50 TTFT of KunServe / upstream",
            ratio([r.median_ttft_ms for r in off], [r.median_ttft_ms for r in upstream]),
            _MOST,
        ),
        at_most(
            8,
            "a load that fits: P99 TTFT of all features / upstream "
            f"(margin: how far upstream's rounds differ, at least {_LEAST_MARGIN:.0%})",
            ratio([r.p99_ttft_ms for r in rounds["drop"]], theirs),
            1 + margin,
        ),
    ]
