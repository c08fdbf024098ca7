"""What was the most lately."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kunserve_sglang.policy.recent_peak import RecentPeak

observed = st.lists(st.tuples(st.floats(0, 20), st.integers(0, 1000)), max_size=40)


@given(observed, st.floats(0, 100))
def test_it_is_of_half_a_minute_at_least_and_of_a_minute_at_most(
    steps: list[tuple[float, int]], later: float
) -> None:
    peak, now = RecentPeak(), 1000.0
    seen: list[tuple[float, int]] = []
    for seconds, value in steps:
        now += seconds
        seen.append((now, value))
        peak.observe(now, value)
    now += later
    found = peak.value(now)
    assert found >= max((v for at, v in seen if at > now - 30), default=0)
    assert found <= max((v for at, v in seen if at >= now - 60), default=0)
