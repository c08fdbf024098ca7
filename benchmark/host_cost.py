"""What surrounds the schedulers of a CPU host: frontends, router, client, and the way between.

Measured on a real cluster of two instances, for a profile of `kunserve_sglang.simulate`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import msgspec
import numpy as np
import psutil

from benchmark.bench import Bench
from benchmark.checks import Section
from benchmark.control import Control
from benchmark.rounds import Round, fresh, median, requests
from benchmark.workload import Shape
from kunserve_sglang.simulation.costs import Costs
from kunserve_sglang.simulation.job import Job
from kunserve_sglang.simulation.profile import HostCost, Profile

_SHAPES = (Shape(48, 2), Shape(48, 16), Shape(48, 64))
_COUNT = 16
_ALONE = Shape(prompt_len=48, output_len=24)
_ALONE_COUNT = 5
_SCHEDULER = "scheduler"
"""In the title of a process that computes."""

_RECEIVED = 1.5
"""How often a micro-batch of two stages is received: an owner may be the second stage itself."""


class Usage(msgspec.Struct, frozen=True):
    """What one load made frontends compute, in seconds of a core."""

    requests: int
    tokens: int
    elapsed_s: float
    frontends_s: float


class Surroundings(msgspec.Struct, frozen=True):
    """What a cluster showed; latencies are medians of single requests, in milliseconds."""

    usage: list[Usage]
    ttft_ms: float
    tpot_ms: float
    cooperative_tpot_ms: float


def with_surroundings(profile: Profile, seen: Surroundings) -> Profile:
    """The profile with what only a real cluster shows."""
    prefill = 1e3 * Costs(profile).prefill([(_job(), 0, _ALONE.prompt_len)])
    passing = seen.cooperative_tpot_ms - seen.tpot_ms - 2 * profile.links.hop_ms
    return msgspec.structs.replace(
        profile,
        frontend_ms=max(0.0, seen.ttft_ms - prefill),
        step=msgspec.structs.replace(profile.step, stage_ms=max(0.0, passing / _RECEIVED)),
        host=fit_host_cost(seen.usage, len(os.sched_getaffinity(0))),
    )


def fit_host_cost(usage: Sequence[Usage], cores: int) -> HostCost:
    """By least squares, beside what idle processes do in that time. Never negative."""
    features = np.array([(u.requests, u.tokens, u.elapsed_s) for u in usage])
    request, token, _ = np.linalg.lstsq(features, [u.frontends_s for u in usage])[0]
    return HostCost(cores=cores, request_ms=max(0.0, 1e3 * request), token_ms=max(0.0, 1e3 * token))


async def surroundings(bench: Bench, cluster: Control) -> Section:
    """For `Bench.by_hand`; `figures["seen"]` are `Surroundings`."""
    await fresh(cluster, requests(bench.prompts, _COUNT, _ALONE))  # warm up
    usage = [await _usage(bench, cluster, shape) for shape in _SHAPES for _ in range(bench.repeat)]
    independent = await _alone(bench, cluster)
    await cluster.drop()
    cooperative = await _alone(bench, cluster)
    seen = Surroundings(
        usage=usage,
        ttft_ms=median([r.median_ttft_ms for r in independent]),
        tpot_ms=median([r.median_tpot_ms for r in independent]),
        cooperative_tpot_ms=median([r.median_tpot_ms for r in cooperative]),
    )
    return Section({"seen": seen})


async def _usage(bench: Bench, cluster: Control, shape: Shape) -> Usage:
    load = requests(bench.prompts, _COUNT, shape)
    started, before = time.perf_counter(), _frontends_s()
    await fresh(cluster, load)
    return Usage(
        requests=len(load),
        tokens=len(load) * shape.output_len,
        elapsed_s=time.perf_counter() - started,
        frontends_s=_frontends_s() - before,
    )


async def _alone(bench: Bench, cluster: Control) -> list[Round]:
    """Requests one after the other."""
    return [await fresh(cluster, requests(bench.prompts, 1, _ALONE)) for _ in range(_ALONE_COUNT)]


def _frontends_s() -> float:
    """Seconds of a core that this process and all it has started used, but for the schedulers."""
    own = psutil.Process()
    family = (own, *own.children(recursive=True))
    times = (p.cpu_times() for p in family if _SCHEDULER not in " ".join(p.cmdline()))
    return sum(t.user + t.system for t in times)


def _job() -> Job:
    return Job(0, 0.0, _ALONE.prompt_len, _ALONE.output_len)
