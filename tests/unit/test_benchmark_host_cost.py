"""What surrounds the schedulers, from figures that a cluster showed."""

from __future__ import annotations

import pytest

from benchmark.host_cost import Surroundings, Usage, fit_host_cost, with_surroundings
from kunserve_sglang.simulation.costs import Costs
from kunserve_sglang.simulation.job import Job
from tests.unit.test_simulation import profile


def usage(requests: int, tokens: int, elapsed_s: float) -> Usage:
    """5 ms a request, 0.5 ms a token, and 3 % of a core for nothing."""
    spent = 5e-3 * requests + 5e-4 * tokens + 0.03 * elapsed_s
    return Usage(requests, tokens, elapsed_s, spent)


LOADS = [usage(16, 32, 1.0), usage(16, 256, 2.5), usage(16, 1024, 7.0), usage(8, 64, 3.0)]


def test_what_frontends_compute_is_found_again() -> None:
    found = fit_host_cost(LOADS, cores=2)
    assert found.cores == 2
    assert found.request_ms == pytest.approx(5.0)
    assert found.token_ms == pytest.approx(0.5)


def test_what_is_not_predicted_is_the_way_and_the_stages() -> None:
    machine = profile()
    prefill_ms = 1e3 * Costs(machine).prefill([(Job(0, 0.0, 48, 24), 0, 48)])
    hops_ms = 2 * machine.links.hop_ms
    seen = Surroundings(
        usage=LOADS, ttft_ms=prefill_ms + 7.0, tpot_ms=20.0, cooperative_tpot_ms=23.0 + hops_ms
    )
    found = with_surroundings(machine, seen)
    assert found.frontend_ms == pytest.approx(7.0)
    assert found.step.stage_ms == pytest.approx(2.0)
    assert found.step.fixed_ms == machine.step.fixed_ms
    assert found.host.cores > 0
