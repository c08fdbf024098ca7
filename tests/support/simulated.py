"""A simulated cluster that is small enough to reckon by hand."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from hypothesis import strategies as st

from kunserve_sglang.core.choices import OverloadPolicy
from kunserve_sglang.core.cluster_config import ClusterConfig
from kunserve_sglang.core.cost_model import CostModel
from kunserve_sglang.simulation import Profile, SimulatedCluster, SimulationResult
from kunserve_sglang.simulation.cluster_profile import Links
from kunserve_sglang.simulation.traces import TraceRow

PREFILL = (0.5, 0.25, 0.125, 0.0, 0.0, 0.0)
DECODE = (2.0, 0.5, 0.0)
LAYERS = 4
BURST = [TraceRow(0.01 * i, 150, 60) for i in range(12)]

loads = st.lists(
    st.tuples(st.floats(0, 6), st.integers(1, 180), st.integers(1, 150)), min_size=1, max_size=60
).map(lambda rows: [TraceRow(*row) for row in sorted(rows)])


def profile(slots: int = 400, chunk: int = 64, **values: object) -> Profile:
    """Four layers of 2 KiB, KV of 64 bytes a token: about `slots` slots beside the parameters."""
    settings = {
        "name": "tiny",
        "source": "made up",
        "layers": LAYERS,
        "memory_budget": str(LAYERS * 2048 + slots * 64 + LAYERS * 2 * 64),
        "resident_bytes": 0,
        "layer_bytes": 2048,
        "kv_bytes_per_token": 64,
        "activation_bytes_per_token": 8,
        "page_bytes": 64,
        "chunked_prefill_size": chunk,
        "cost": CostModel(prefill=PREFILL, decode=DECODE),
        "links": Links(
            exchange_bytes_per_s=1e6,
            parameters_bytes_per_s=1e6,
            activations_bytes_per_s=1e6,
            hop_ms=0.125,
            transition_ms=1.0,
        ),
    }
    return Profile(**{**settings, **values})  # type: ignore[arg-type]


def simulate(
    rows: Sequence[TraceRow],
    instances: int = 1,
    policy: str = "none",
    machine: Profile | None = None,
    **config: object,
) -> SimulationResult:
    settings = ClusterConfig(
        num_instances=instances,
        overload_policy=OverloadPolicy(policy),
        **config,  # type: ignore[arg-type]
    )
    return SimulatedCluster(machine or profile(), settings).run(rows)


def slow(parameters_bytes_per_s: float) -> Links:
    """The links of `profile`, but for parameters."""
    return msgspec.structs.replace(profile().links, parameters_bytes_per_s=parameters_bytes_per_s)
