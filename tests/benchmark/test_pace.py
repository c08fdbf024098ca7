"""A profile of a machine that has become slower."""

from __future__ import annotations

import pytest

from benchmark.pace import expected_tpot_ms, slowed
from benchmark.simulator import simulate
from kunserve_sglang.simulation.cluster_profile import HostCost, StepCost
from kunserve_sglang.simulation.traces import TraceRow
from tests.support.simulated import profile

MACHINE = profile(
    frontend_ms=3.0,
    step=StepCost(fixed_ms=3.0, request_ms=0.5, token_ms=0.25),
    host=HostCost(cores=2, request_ms=1.0, token_ms=0.1, contention=0.05),
)


def test_a_slower_machine_takes_so_much_longer_for_all_it_computes() -> None:
    rows = [TraceRow(float(i), 40, 10) for i in range(4)]  # one after the other
    fast, slow = (simulate(m, 1, "none", rows).jobs for m in (MACHINE, slowed(MACHINE, 1.5)))
    for a, b in zip(fast, slow, strict=True):
        assert b.ttft == pytest.approx(1.5 * a.ttft)
        assert b.tpot == pytest.approx(1.5 * a.tpot)


def test_what_is_expected_of_a_few_requests_at_each_instance() -> None:
    """Four decode together: 4 * (2 + 4 * 0.5) ms a step; the first waits for three prefills."""
    assert expected_tpot_ms(profile(), 2) == pytest.approx(16.0, rel=0.1)
    assert expected_tpot_ms(slowed(MACHINE, 1.2), 2) > 1.15 * expected_tpot_ms(MACHINE, 2)
