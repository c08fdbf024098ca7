"""What forecasts are made for: the mean of some instances, each of which owns requests."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kunserve_sglang.core.cost_model import CostModel
from kunserve_sglang.core.layout import Layout
from kunserve_sglang.core.load import Slots
from kunserve_sglang.policy.forecast import Requests, Serving
from kunserve_sglang.policy.pipeline_times import PipelineTimes
from kunserve_sglang.policy.service_level import StepTimes, times_of
from kunserve_sglang.policy.state import ClusterState, InstanceState

_AHEAD = 2.0
"""Requests are expected to come as fast as now for so many times as long as one takes alone."""

_MOST_HELD = 1.5
"""Slots kept for a request, in multiples of what it is expected to need. If there seem to be more,
requests wait for something else."""


def known_times(owners: Sequence[InstanceState]) -> StepTimes:
    """The mean of the owners; raises `ValueError` if one of them has not measured its costs."""
    costs: list[CostModel] = [s.costs for s in owners if s.costs is not None]
    if not costs or len(costs) < len(owners):
        raise ValueError("not all instances have measured what their steps cost")
    times = times_of(costs, owners[0].layer_count)
    lone = times.alone(1, 1)
    if min(*times.prefill, *times.decode) < 0 or min(lone.ttft_ms, lone.tpot_ms) <= 0:
        raise ValueError("what instances say of their costs cannot be")
    return times


def serving(
    state: ClusterState, owners: Sequence[InstanceState], layouts: dict[int, Layout]
) -> Serving:
    """How the mean of the owners is served by these layouts."""
    capacity = sum(layouts[s.instance].member(s.instance).capacity for s in owners)
    stages = max(len(layouts[s.instance].members) for s in owners)
    across = any(map(state.spans_hosts, layouts.values()))
    return Serving(capacity=capacity / len(owners), stages=stages, across=across)


def requests_of(
    owners: Sequence[InstanceState], times: StepTimes, stages: int, per_second: float
) -> Requests:
    """The mean owner's requests; `per_second` more come at all of these.

    Reports say what all need together, and what there is of it already.
    """
    count = len(owners)
    running = sum(s.load.running for s in owners)
    waiting = sum(s.load.waiting for s in owners)
    used = sum(s.load.slots.used for s in owners)
    prompts = sum(s.load.prompts for s in owners)
    produced = sum(s.load.produced for s in owners)
    to_come = max(running + waiting, sum(s.load.demand for s in owners) - used - prompts)
    everybody = max(1, running + waiting)
    prompt = max(1.0, (used - produced + prompts) / everybody)
    output = max(1.0, (to_come + produced) / everybody)
    left = (to_come - waiting * output) / running if running else output
    lone = times.alone(prompt, prompt + output / 2)
    left = min(output, max(1.0, left))
    pipeline = PipelineTimes(times=times, stages=stages)
    return Requests(
        running=running / count,
        waiting=waiting / count,
        prompt=prompt,
        output=output,
        left=left,
        held=_held(owners, prompt + output),
        per_second=per_second / count,
        ahead_s=_AHEAD * (lone.ttft_ms + output * lone.tpot_ms) / 1e3,
        token_ms=pipeline.step_ms(running / count, used / count),
    )


def _held(owners: Sequence[InstanceState], needed: float) -> float:
    """Slots for each that runs, by what is seen where some wait for slots; 0 where nobody does.

    SGLang keeps some free, by rules of its own and by what clients allow, so that fewer run than
    expected lengths would let.
    """
    full = [s.load for s in owners if s.load.waiting and s.load.running and _full(s.load.slots)]
    running = sum(load.running for load in full)
    if not running:
        return 0.0
    return min(_MOST_HELD * needed, sum(load.slots.capacity for load in full) / running)


def _full(slots: Slots) -> bool:
    """Whether requests may be waiting for slots; with most of them free it is something else."""
    return slots.used > slots.capacity / 2


def most_running(
    owners: Sequence[InstanceState],
    asked: Requests,
    times: StepTimes,
    stages: int,
    limit_ms: float,
) -> float:
    """How many requests an owner may run so that a token takes no longer than the limit.

    In a group never fewer than there would be slots for without it. While an answer comes, as many
    prompts are computed as requests run: they count as well.
    """
    alone = sum(s.full_capacity for s in owners) / len(owners) / (asked.prompt + asked.output)
    least = 1.0 if stages == 1 else max(1.0, alone)
    pipeline = PipelineTimes(times=times, stages=stages)
    context = asked.prompt + asked.output / 2

    def tpot_ms(requests: float) -> float:
        prompts = requests * pipeline.prompts_ms(1, asked.prompt) / asked.output
        return pipeline.step_ms(requests, requests * context) + prompts

    fixed = tpot_ms(0)
    each = tpot_ms(1) - fixed
    return max(least, (limit_ms - fixed) / each if each > 0 else math.inf)
