"""What surrounds the layers, from figures that a cluster showed."""

from __future__ import annotations

import msgspec
import pytest

from benchmark.host_cost import Surroundings, Usage, host_cost, with_surroundings
from kunserve_sglang.core.cost_model import Chunk, Work
from kunserve_sglang.simulation.cluster_profile import HostCost, StepCost
from tests.support.simulated import profile

STEP = StepCost(fixed_ms=3.0, request_ms=0.5, token_ms=0.25, stage_ms=2.0, delayed=True)
HOST = HostCost(cores=2, request_ms=5.0, token_ms=0.5, contention=0.05)
FRONTEND_MS = 7.0


def tpot(batch: int) -> float:
    """32 tokens after a prompt of 48, in the middle."""
    layers = 4 * profile().cost.predict(Work(decodes=batch, context=64 * batch))
    return layers + STEP.fixed_ms + STEP.request_ms * batch


def both_tpot(batch: int) -> float:
    """Two of them, slowed down by each other and by half a millisecond for each of the tokens."""
    return tpot(batch) * (1 + HOST.contention) + 2 * batch * HOST.token_ms / HOST.cores


def ttft(prompt: int) -> float:
    layers = 4 * profile().cost.predict(Work(chunks=(Chunk(0, prompt),)))
    own = layers + STEP.fixed_ms + STEP.request_ms + STEP.token_ms * prompt
    return FRONTEND_MS + own + tpot(1)


SEEN = Surroundings(
    usage=[Usage(r, t, (5.0 * r + 0.5 * t) / 1e3) for r, t in ((16, 32), (16, 1024), (8, 64))],
    cores=2,
    ttft_ms={n: ttft(n) for n in (48, 240)},
    tpot_ms={n: tpot(n) for n in (1, 4, 8)},
    both_tpot_ms={n: both_tpot(n) for n in (1, 4, 8)},
    cooperative_tpot_ms=tpot(1) + 1.5 * STEP.stage_ms + 2 * profile().links.hop_ms,
)


def test_what_was_put_in_is_found_again() -> None:
    found = with_surroundings(profile(step=StepCost(delayed=True)), SEEN)
    for step, expected in ((found.step, STEP), (found.host, HOST)):
        assert msgspec.structs.astuple(step) == pytest.approx(msgspec.structs.astuple(expected))
    assert found.frontend_ms == pytest.approx(FRONTEND_MS)


def test_nothing_is_negative_where_a_measurement_disagrees() -> None:
    quick = {n: 0.5 * ms for n, ms in SEEN.both_tpot_ms.items()}
    assert host_cost(msgspec.structs.replace(SEEN, both_tpot_ms=quick)).contention == 0.0
    falling = msgspec.structs.replace(SEEN, tpot_ms={1: 60.0, 4: 50.0, 8: 40.0})
    step = with_surroundings(profile(), falling).step
    assert step.request_ms == 0.0
    assert step.fixed_ms >= 0.0
    assert step.stage_ms == 0.0
