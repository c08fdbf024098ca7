"""A drop under load that moves at least 50 MB of KV: what running and new requests feel of it.

Rounds with and without a drop take turns. In each, two dozen requests decode; once their prompts
and some tokens are in the pools, the drop begins and a few short requests are sent. What counts
are the gaps between tokens that it falls into: the prompts before it have made longer ones.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

from benchmark.bench import Bench
from benchmark.checks import Section, at_least, at_most
from benchmark.control import Control
from benchmark.experiment import RunError
from benchmark.gaps import Stall, stall
from benchmark.rounds import median, requests, send, span_of
from benchmark.workload import Shape

_BUDGET = "352MiB"
"""Some 8,000 slots, of which more than half are used when the drop comes."""

_LOAD = Shape(prompt_len=160, output_len=96)
_COUNT = 28
_USED_SLOTS = 4700
_PROBE = Shape(prompt_len=48, output_len=4)
_PROBES, _PROBE_EVERY_S = 4, 0.05
_FILL_TIMEOUT_S = 60.0
_MIN_BYTES = 50e6
_MAX_STALL = 10.0


@dataclass(frozen=True, slots=True)
class _Outcome:
    """`whole` is over the lives of the requests, `during` while the drop took place."""

    whole: Stall
    during: Stall | None
    probe_ttft_ms: float
    event: dict[str, Any] | None


def measure(bench: Bench) -> Section:
    return bench.by_hand("exchange", _measure, budget=_BUDGET)


async def _measure(bench: Bench, cluster: Control) -> Section:
    rounds = -(-bench.repeat // 2)
    calm: list[_Outcome] = []
    dropped: list[_Outcome] = []
    await _round(bench, cluster, drop=False)  # warm up
    for turn in range(rounds):
        bench.say(f"exchange: round {turn + 1} of {rounds}")
        calm.append(await _round(bench, cluster, drop=False))
        dropped.append(await _round(bench, cluster, drop=True))
        await cluster.restore()
    events = [o.event for o in dropped if o.event is not None]
    ttft = {
        name: [o.probe_ttft_ms for o in outcomes]
        for name, outcomes in (("with", dropped), ("without", calm))
    }
    moved = min(e["exchanged_bytes"] for e in events)
    during = [o.during for o in dropped if o.during is not None]
    worst = max(s.worst_ratio for s in during)
    return Section(
        {
            "exchanged_bytes": [e["exchanged_bytes"] for e in events],
            "event_stall_ms": [e["stall_ms"] for e in events],
            "longest_gap_ms": [1e3 * s.longest_s for s in during],
            "longest_gap_ratio": [s.worst_ratio for s in during],
            "longest_gap_ratio_of_all_time": {
                "with": [o.whole.worst_ratio for o in dropped],
                "without": [o.whole.worst_ratio for o in calm],
            },
            "probe_ttft_ms": ttft,
            "probe_ttft_ratio": median(ttft["with"]) / median(ttft["without"]),
        },
        (
            at_least(6, "KV moved by one drop under load (MB)", moved / 1e6, _MIN_BYTES / 1e6),
            at_most(
                6, "longest gap of a running request in it / its median gap", worst, _MAX_STALL
            ),
        ),
    )


async def _round(bench: Bench, cluster: Control, *, drop: bool) -> _Outcome:
    await cluster.forget()
    load = requests(bench.prompts, _COUNT, _LOAD)
    probes = requests(bench.prompts, _PROBES, _PROBE, every_s=_PROBE_EVERY_S)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(send(cluster.url, load))
        await _until_filled(cluster)
        transition = tasks.create_task(cluster.drop()) if drop else None
        probing = tasks.create_task(send(cluster.url, probes))
    load_round, event = running.result(), transition.result() if transition else None
    return _Outcome(
        whole=stall(load_round.results),
        during=stall(load_round.results, *span_of(event, load_round)) if event else None,
        probe_ttft_ms=probing.result().median_ttft_ms,
        event=event,
    )


async def _until_filled(cluster: Control) -> None:
    deadline = time.monotonic() + _FILL_TIMEOUT_S
    while time.monotonic() < deadline:
        sample = await cluster.sample(0.0)
        if sample.running == _COUNT and sample.slots_used >= _USED_SLOTS:
            return
        await asyncio.sleep(0.05)
    raise RunError(f"{_COUNT} requests did not hold {_USED_SLOTS} slots in {_FILL_TIMEOUT_S:g} s")
