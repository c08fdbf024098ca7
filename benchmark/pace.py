"""How fast a machine is just now, beside what a profile says of it.

A virtual machine runs at one speed now and 10 % slower an hour later, and a queue that builds up
makes a multiple of that. So a simulation is told how fast the machine was that it is compared with.
"""

from __future__ import annotations

import asyncio

import msgspec

from benchmark.prompts import PromptSource
from benchmark.rounds import median, requests, send
from benchmark.workload import Request, Shape
from kunserve_sglang import simulation
from kunserve_sglang.core.choices import OverloadPolicy
from kunserve_sglang.core.cluster_config import ClusterConfig
from kunserve_sglang.core.cost_model import CostModel
from kunserve_sglang.simulation import Profile
from kunserve_sglang.simulation.cluster_profile import HostCost, StepCost
from kunserve_sglang.simulation.traces import TraceRow

_SHAPE = Shape(prompt_len=48, output_len=40)
_BATCH = 4


def steady_load(prompts: PromptSource, instances: int) -> list[Request]:
    """A few requests at each instance at once, which fit everywhere."""
    return requests(prompts, _BATCH * instances, _SHAPE)


def measured_tpot_ms(url: str, load: list[Request]) -> float:
    """Of a load on a cluster that does nothing else."""
    return asyncio.run(send(url, load)).median_tpot_ms


def expected_tpot_ms(profile: Profile, instances: int) -> float:
    """What a simulation says of `steady_load`."""
    config = ClusterConfig(num_instances=instances, overload_policy=OverloadPolicy.NONE)
    rows = [TraceRow(0.0, _SHAPE.prompt_len, _SHAPE.output_len)] * (_BATCH * instances)
    return 1e3 * median(
        [job.tpot for job in simulation.SimulatedCluster(profile, config).run(rows).jobs]
    )


def slowed(profile: Profile, factor: float) -> Profile:
    """All that is computed takes `factor` times as long."""

    def times(part: CostModel | StepCost | HostCost, *names: str) -> dict[str, float]:
        return {name: factor * getattr(part, name) for name in names}

    replace = msgspec.structs.replace
    step = times(profile.step, "fixed_ms", "request_ms", "token_ms", "stage_ms")
    return replace(
        profile,
        cost=CostModel(
            prefill=tuple(factor * c for c in profile.cost.prefill),
            decode=tuple(factor * c for c in profile.cost.decode),
        ),
        step=replace(profile.step, **step),
        host=replace(profile.host, **times(profile.host, "request_ms", "token_ms")),
        frontend_ms=factor * profile.frontend_ms,
    )
