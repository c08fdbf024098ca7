"""How soon a drop helps those who wait, and what a restore costs those who run.

Drop: pools are full and requests wait. From the decision (the event's `time`) to the first token
of the first of them takes the drop itself, the end of the running step, and a prefill. The last
two are measured by themselves: the same number of requests sent at once to the group as it is after
the drop, with as many others running, to the first token of the first of them. What is left is what
the drop adds.

Restore: gaps between tokens that overlap the transition, against those of the seconds before it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmark.bench import Bench
from benchmark.checks import Section, at_most
from benchmark.control import Control, control
from benchmark.experiment import RunError
from benchmark.gaps import percentile_ms, within
from benchmark.noise import Noise
from benchmark.rounds import Round, fresh, median, requests, send, span_of
from benchmark.timeline import Sample
from benchmark.workload import Shape

_HELD, _HELD_COUNT = Shape(prompt_len=300, output_len=80), 6
"""Three on each instance of the default budget take 900 of its 1,190 slots from the start on."""

_LATE, _LATE_COUNT = Shape(prompt_len=320, output_len=16), 4
"""Their prompts do not fit into the rest, however little SGLang expects the others to produce."""

_CALM = Shape(prompt_len=96, output_len=112)
_CALM_COUNT = 6
_BEFORE_RESTORE_S = 4.0
_STATE_TIMEOUT_S = 60.0
_SETTLED_S = 0.5
_MOST_ADDED_MS = 100.0
_MOST_RESTORE_RATIO = 1.3


@dataclass(frozen=True, slots=True)
class _RestoreCost:
    before_ms: float
    during_ms: float


def measure(bench: Bench) -> Section:
    with bench.kunserve("transitions") as cluster:
        return asyncio.run(_measure(bench, cluster.url))


async def _measure(bench: Bench, url: str) -> Section:
    noise = Noise()
    admitted: list[float] = []
    usual: list[float] = []
    restores: list[_RestoreCost] = []
    rounds = -(-bench.repeat // 2)
    async with control(url) as cluster:
        await cluster.automatic(False)
        await fresh(cluster, requests(bench.prompts, 4, _CALM))  # warm up
        for turn in range(rounds):
            bench.say(f"transitions: round {turn + 1} of {rounds}")
            admitted.append(await _first_admitted_ms(bench, cluster))
            usual.append(await _first_of_new_ms(bench, cluster))
            restores.append(await _restore_cost(bench, cluster))
    added = [a - b for a, b in zip(admitted, usual, strict=True)]
    ratio = median([r.during_ms / r.before_ms for r in restores])
    return Section(
        {
            "decision_to_first_token_ms": admitted,
            "first_token_with_room_ms": usual,
            "p99_gap_before_restore_ms": [r.before_ms for r in restores],
            "p99_gap_during_restore_ms": [r.during_ms for r in restores],
            "noise": noise.share(),
        },
        (
            at_most(
                7,
                "drop: decision to first token of who waited, beyond step and prefill (ms)",
                median(added),
                _MOST_ADDED_MS,
            ),
            at_most(7, "restore: P99 TPOT during it / before it", ratio, _MOST_RESTORE_RATIO),
        ),
    )


async def _first_admitted_ms(bench: Bench, cluster: Control) -> float:
    """From the decision for a drop to the first token of a request that waited for it."""
    await cluster.forget()
    async with asyncio.TaskGroup() as tasks:
        await _hold(bench, cluster, tasks)
        sending = tasks.create_task(send(cluster.url, requests(bench.prompts, _LATE_COUNT, _LATE)))
        await _until(cluster, lambda s: s.waiting == _LATE_COUNT)
        event = await cluster.drop()
    late = sending.result()
    decided, _ = span_of(event, late)
    return 1e3 * (min(r.sent_s + r.ttft_s for r in late.results) - decided)


async def _first_of_new_ms(bench: Bench, cluster: Control) -> float:
    """The same requests, with room for all of them: to the first token of the first."""
    await cluster.forget()
    async with asyncio.TaskGroup() as tasks:
        await _hold(bench, cluster, tasks)
        sending = tasks.create_task(send(cluster.url, requests(bench.prompts, _LATE_COUNT, _LATE)))
    return 1e3 * min(r.sent_s + r.ttft_s for r in sending.result().results)


async def _hold(bench: Bench, cluster: Control, tasks: asyncio.TaskGroup) -> None:
    """Requests that run, and leave no room in full replicas for another prompt."""
    tasks.create_task(send(cluster.url, requests(bench.prompts, _HELD_COUNT, _HELD)))
    await _until(cluster, lambda s: s.running == _HELD_COUNT and s.waiting == 0)


async def _restore_cost(bench: Bench, cluster: Control) -> _RestoreCost:
    await cluster.forget()
    load = requests(bench.prompts, _CALM_COUNT, _CALM)
    async with asyncio.TaskGroup() as tasks:
        sending = tasks.create_task(send(cluster.url, load))
        await _until(cluster, lambda s: s.running == _CALM_COUNT and s.waiting == 0)
        await asyncio.sleep(_BEFORE_RESTORE_S)
        event = await cluster.restore()
    return restore_cost(sending.result(), event)


def restore_cost(load: Round, event: Mapping[str, Any]) -> _RestoreCost:
    """P99 of the gaps before and during a transition."""
    start, end = span_of(event, load)
    during = within(load.results, start, end)
    before = within(load.results, start - _BEFORE_RESTORE_S, start)
    before = [gap for gap in before if gap.end_s <= start]
    return _RestoreCost(percentile_ms(before, 99), percentile_ms(during, 99))


async def _until(cluster: Control, condition: Callable[[Sample], bool]) -> None:
    """The condition holds, and has for long enough for all prompts that fit to be in the pools."""
    now = since = time.monotonic()
    deadline = now + _STATE_TIMEOUT_S
    last: tuple[int, int] | None = None
    while now < deadline:
        sample = await cluster.sample(0.0)
        state = (sample.running, sample.waiting)
        if not condition(sample) or state != last:
            since, last = now, state
        if now - since >= _SETTLED_S:
            return
        await asyncio.sleep(0.02)
        now = time.monotonic()
    raise RunError(f"the load did not get into the pools as planned: {sample}")
