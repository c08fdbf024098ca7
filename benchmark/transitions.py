"""How soon a drop helps those who wait, and what a restore costs those who run.

Drop: pools are full and requests wait. From the decision (the event's `time`), or the end of the
steps that run then, to the moment at which the first micro-batch with a waiting prompt starts: both
are read from a recording of what the instances do. Time to first token beside it, with the drop and
with room from the start.

Restore: TPOT of each running request over the transition (the mean of its gaps between tokens that
overlap it), against that over the seconds before; single gaps beside it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmark.bench import Bench
from benchmark.checks import Section, at_most
from benchmark.control import Control
from benchmark.experiment import RunError
from benchmark.gaps import percentile_ms, tpots_ms, within
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
_TRACE_S, _TRACE_LEAD_S = 2.0, 0.1
_MAX_ADDED_MS = 100.0
_MAX_RESTORE_RATIO = 1.3


@dataclass(frozen=True, slots=True)
class RestoreCost:
    """P99 of TPOT and of single gaps, before and during a restore, in milliseconds."""

    tpot_before: float
    tpot_during: float
    gap_before: float
    gap_during: float


@dataclass(frozen=True, slots=True)
class _Admission:
    added_ms: float
    first_token_ms: float


def measure(bench: Bench) -> Section:
    return bench.by_hand("transitions", _measure)


async def _measure(bench: Bench, cluster: Control) -> Section:
    admitted: list[_Admission] = []
    usual: list[float] = []
    restores: list[RestoreCost] = []
    rounds = -(-bench.repeat // 2)
    await fresh(cluster, requests(bench.prompts, 4, _CALM))  # warm up
    for turn in range(rounds):
        bench.say(f"transitions: round {turn + 1} of {rounds}")
        admitted.append(await _first_admitted(bench, cluster))
        usual.append(await _first_of_new_ms(bench, cluster))
        restores.append(await _restore_cost(bench, cluster))
    return Section(
        {
            "decision_to_admission_ms": [a.added_ms for a in admitted],
            "decision_to_first_token_ms": [a.first_token_ms for a in admitted],
            "first_token_with_room_ms": usual,
            "restore": [asdict(r) for r in restores],
        },
        (
            at_most(
                7,
                "drop: decision to the first prompt that had to wait, beyond running steps (ms)",
                median([a.added_ms for a in admitted]),
                _MAX_ADDED_MS,
            ),
            at_most(
                7,
                "restore: P99 TPOT during it / before it",
                median([r.tpot_during / r.tpot_before for r in restores]),
                _MAX_RESTORE_RATIO,
            ),
        ),
    )


async def _first_admitted(bench: Bench, cluster: Control) -> _Admission:
    """From the decision for a drop to what it brings to those who wait for it."""
    await cluster.forget()
    async with asyncio.TaskGroup() as tasks:
        await _hold(bench, cluster, tasks)
        sending = tasks.create_task(send(cluster.url, requests(bench.prompts, _LATE_COUNT, _LATE)))
        await _until(cluster, lambda s: s.waiting == _LATE_COUNT)
        recording = tasks.create_task(cluster.trace(_TRACE_S))
        await asyncio.sleep(_TRACE_LEAD_S)
        event = await cluster.drop()
    late = sending.result()
    decided, _ = span_of(event, late)
    return _Admission(
        added_ms=admission_ms(recording.result(), event),
        first_token_ms=1e3 * (min(r.sent_s + r.ttft_s for r in late.results) - decided),
    )


def admission_ms(recording: Mapping[str, Any], event: Mapping[str, Any]) -> float:
    """From a drop's decision, or the end of steps that run then, to the first prefill after it.

    NaN if the recording has no prefill after the drop.
    """
    began = float(recording["otherData"]["began"])
    spans: list[tuple[float, float, dict[str, Any]]] = [
        (began + e["ts"] / 1e6, began + (e["ts"] + e["dur"]) / 1e6, e)
        for e in recording["traceEvents"]
        if e["ph"] == "X"
    ]
    decided = float(event["time"])
    ready = max([decided, *(end for start, end, _ in spans if start <= decided < end)])
    changed = max((end for _, end, e in spans if e["name"] == "exchange"), default=decided)
    prefills = [
        start
        for start, _, e in spans
        if e["name"] == "own layers" and not e["args"]["decode"] and start >= changed
    ]
    return 1e3 * (min(prefills, default=float("nan")) - ready)


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


async def _restore_cost(bench: Bench, cluster: Control) -> RestoreCost:
    await cluster.forget()
    load = requests(bench.prompts, _CALM_COUNT, _CALM)
    async with asyncio.TaskGroup() as tasks:
        sending = tasks.create_task(send(cluster.url, load))
        await _until(cluster, lambda s: s.running == _CALM_COUNT and s.waiting == 0)
        await asyncio.sleep(_BEFORE_RESTORE_S)
        event = await cluster.restore()
    return restore_cost(sending.result(), event)


def restore_cost(load: Round, event: Mapping[str, Any]) -> RestoreCost:
    """What a restore did to the requests of a load."""
    start, end = span_of(event, load)
    before_s = start - _BEFORE_RESTORE_S
    calm = [g for g in within(load.results, before_s, start) if g.end_s <= start]
    return RestoreCost(
        tpot_before=_p99(tpots_ms(load.results, before_s, start, inside=True)),
        tpot_during=_p99(tpots_ms(load.results, start, end)),
        gap_before=percentile_ms(calm, 99),
        gap_during=percentile_ms(within(load.results, start, end), 99),
    )


def _p99(values: Sequence[float]) -> float:
    return float(np.percentile(values, 99)) if values else float("nan")


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
