"""What surrounds the layers on a CPU host: steps, frontends, a busy neighbour, and the way between.

Measured on a real cluster of two instances, for a profile of `kunserve_sglang.simulate`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from benchmark.bench import Bench
from benchmark.checks import Section
from benchmark.control import Control
from benchmark.rounds import fresh, median, requests, send
from benchmark.workload import Shape
from kunserve_sglang.core.cost_model import Chunk, Work
from kunserve_sglang.core.processes import family
from kunserve_sglang.simulation.cluster_profile import HostCost, Profile, StepCost

_BATCHES = (1, 4, 8, 16)
_PROMPT, _OUTPUT = 48, 32
_PROMPTS = (_PROMPT, 240)
_FRONTENDS = (Shape(_PROMPT, 2), Shape(_PROMPT, 64))
_COUNT = 16

_SCHEDULER = "scheduler"
"""In the title of a process that computes."""

_RECEIVED = 1.5
"""How often a micro-batch of two stages is received: an owner may be the second stage itself."""


class Usage(msgspec.Struct, frozen=True):
    """What one load made frontends compute, in seconds of a core."""

    requests: int
    tokens: int
    frontends_s: float


class Surroundings(msgspec.Struct, frozen=True):
    """What a cluster showed: medians, in milliseconds.

    `ttft_ms` by the length of the prompt and `tpot_ms` by the size of the batch, while the other
    instance is idle; `both_tpot_ms` while it has the same to do. `cooperative_tpot_ms` is that of
    one request in a group.
    """

    usage: list[Usage]
    cores: int
    ttft_ms: dict[int, float]
    tpot_ms: dict[int, float]
    both_tpot_ms: dict[int, float]
    cooperative_tpot_ms: float


def with_surroundings(profile: Profile, seen: Surroundings) -> Profile:
    """The profile with what only a real cluster shows. Nothing gets negative."""
    layers, model = profile.layers, profile.cost
    fixed, request = _line(
        {n: t - layers * model.predict(_decode(n)) for n, t in seen.tpot_ms.items()}
    )
    before, token = _line(
        {n: t - layers * model.predict(_prefill(n)) for n, t in seen.ttft_ms.items()}
    )
    # With overlap scheduling the first token leaves when the step after its own is through.
    late = seen.tpot_ms[1] if profile.step.delayed else 0.0
    passing = seen.cooperative_tpot_ms - seen.tpot_ms[1] - 2 * profile.links.hop_ms
    return msgspec.structs.replace(
        profile,
        frontend_ms=max(0.0, before - fixed - request - late),
        step=StepCost(
            fixed_ms=fixed,
            request_ms=request,
            token_ms=token,
            stage_ms=max(0.0, passing / _RECEIVED),
            delayed=profile.step.delayed,
        ),
        host=host_cost(seen),
    )


def host_cost(seen: Surroundings) -> HostCost:
    """What instances and frontends on the same cores take from each other."""
    features = np.array([(u.requests, u.tokens) for u in seen.usage])
    found, *_ = np.linalg.lstsq(features, [1e3 * u.frontends_s for u in seen.usage])
    request_ms, token_ms = (max(0.0, float(ms)) for ms in found)
    slower = []
    for batch, both_ms in seen.both_tpot_ms.items():
        frontends = 2 * batch * token_ms / both_ms / seen.cores
        slower.append((1 - frontends) * both_ms / seen.tpot_ms[batch] - 1)
    return HostCost(
        cores=seen.cores,
        request_ms=request_ms,
        token_ms=token_ms,
        contention=max(0.0, median(slower)),
    )


async def surroundings(bench: Bench, cluster: Control) -> Section:
    """For `Bench.by_hand`; `figures["seen"]` are `Surroundings`."""
    urls = await cluster.owner_urls()
    await fresh(cluster, requests(bench.prompts, _COUNT, _FRONTENDS[0]))  # warm up
    usage = [await _usage(bench, cluster, s) for s in _FRONTENDS for _ in range(bench.repeat)]
    ttft = {n: await _ttft(bench, cluster, n) for n in _PROMPTS}
    alone = {n: await _tpot(bench, cluster, urls[:1], n) for n in _BATCHES}
    both = {n: await _tpot(bench, cluster, urls, n) for n in _BATCHES}
    await cluster.drop()
    seen = Surroundings(
        usage=usage,
        cores=len(os.sched_getaffinity(0)),
        ttft_ms=ttft,
        tpot_ms=alone,
        both_tpot_ms=both,
        cooperative_tpot_ms=await _tpot(bench, cluster, urls[:1], 1),
    )
    return Section({"seen": seen})


async def _usage(bench: Bench, cluster: Control, shape: Shape) -> Usage:
    load = requests(bench.prompts, _COUNT, shape)
    await cluster.forget()
    before = _frontends_s()
    await send(cluster.url, load)
    return Usage(len(load), len(load) * shape.output_len, _frontends_s() - before)


async def _ttft(bench: Bench, cluster: Control, prompt: int) -> float:
    """Of requests one after the other."""
    shape = Shape(prompt, 4)
    rounds = [await fresh(cluster, requests(bench.prompts, 1, shape)) for _ in range(bench.repeat)]
    return median([r.median_ttft_ms for r in rounds])


async def _tpot(bench: Bench, cluster: Control, urls: Sequence[str], batch: int) -> float:
    """Of batches of one size, one at each of these instances."""
    found = []
    for _ in range(bench.repeat):
        await cluster.forget()
        loads = [requests(bench.prompts, batch, Shape(_PROMPT, _OUTPUT)) for _ in urls]
        rounds = await asyncio.gather(*map(send, urls, loads))
        found += [r.median_tpot_ms for r in rounds]
    return median(found)


def _frontends_s() -> float:
    """Seconds of a core that this process and all it has started used, but for the schedulers."""
    times = (p.cpu_times() for p in family() if _SCHEDULER not in " ".join(p.cmdline()))
    return float(sum(t.user + t.system for t in times))


def _decode(batch: int) -> Work:
    """The step in the middle of a measured answer."""
    return Work(decodes=batch, context=batch * (_PROMPT + _OUTPUT // 2))


def _prefill(tokens: int) -> Work:
    return Work(chunks=(Chunk(0, tokens),))


def _line(points: Mapping[int, float]) -> tuple[float, float]:
    """Intercept and slope by least squares, neither below zero."""
    slope, intercept = np.polyfit(list(points), list(points.values()), 1)
    if slope < 0:
        return max(0.0, median(list(points.values()))), 0.0
    return max(0.0, float(intercept)), float(slope)
