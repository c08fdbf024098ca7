"""How fast requests come is counted."""

from __future__ import annotations

import pytest

from kunserve_sglang.policy.arrivals import Arrivals
from tests.support.clusters import cluster, with_counts


def test_arrivals_are_counted_as_they_come_and_forgotten() -> None:
    state, counted = cluster(2), Arrivals()
    for tick in range(400):
        counted.observe(tick / 20, with_counts(state, arrived=tick // 5))
    assert counted.per_second == pytest.approx(8.0, rel=0.15)
    counted.observe(20.0, with_counts(state))  # both have begun anew
    counted.observe(60.0, with_counts(state))
    assert counted.per_second < 0.01
