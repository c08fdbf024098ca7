"""Where requests want different things, decisions go by what each of them wants."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kunserve_sglang.core.cost_model import CostModel
from kunserve_sglang.policy.bounds import Bounds
from kunserve_sglang.policy.decision import NoPlan
from kunserve_sglang.policy.forecast import Requests, Serving, forecast
from kunserve_sglang.policy.queueing import with_held
from kunserve_sglang.policy.service_level import (
    UNNAMED,
    LatencyLimits,
    ServiceLevel,
    StepTimes,
    Wanted,
    limits_by_share,
)
from kunserve_sglang.policy.state import ClusterState
from tests.unit.policy.test_forecast import limits, loads, machines, ways
from tests.unit.policy.test_weighing import (
    COMPUTING_IS_SHORT,
    MEMORY_IS_SHORT,
    dropped,
    expected,
    flooded,
    overloaded,
)

SHARING_PAYS = CostModel(prefill=(0.05, 0.01, 0.001, 0, 0, 0), decode=(1.0, 0.25, 0.0))
"""Eight requests at once take three times as long as one."""

PATIENT = ServiceLevel(ttft_ms=1e9, tpot_ms=1e9)
HASTY = ServiceLevel(ttft_ms=1e-6, tpot_ms=1e-6)


def wanting(state: ClusterState, **requests: int) -> ClusterState:
    levels = {"patient": PATIENT, "hasty": HASTY, "unnamed": UNNAMED}
    wanted = tuple(Wanted(level=levels[name], requests=n) for name, n in requests.items())
    return msgspec.structs.replace(state, wanted=wanted)


@given(loads, ways, machines, limits, limits, limits, st.floats(0, 1))
def test_a_forecast_for_parts_of_the_requests_is_the_mean_of_those_for_each(
    asked: Requests,
    way: Serving,
    times: StepTimes,
    usual: LatencyLimits,
    one: LatencyLimits,
    other: LatencyLimits,
    share: float,
) -> None:
    both = forecast(asked, way, times, usual, ((share, one), (1 - share, other)))
    alone = [forecast(asked, way, times, usual, ((1.0, part),)) for part in (one, other)]
    mean = share * alone[0].within + (1 - share) * alone[1].within
    assert both.within == pytest.approx(mean, rel=1e-6, abs=1e-6)
    assert (both.ttft_ms, both.e2e_ms) == (alone[0].ttft_ms, alone[0].e2e_ms)
    # Without parts, all have the usual limits.
    assert forecast(asked, way, times, usual) == forecast(asked, way, times, usual, ((1.0, usual),))


def test_what_requests_name_goes_before_what_is_usual() -> None:
    times = StepTimes(prefill=(2.0, 1.0, 0.1, 0.0, 0.0, 0.0), decode=(20.0, 0.0, 0.0))
    usual = ServiceLevel(ttft_ms=100.0)
    wanted = [
        Wanted(level=UNNAMED, requests=2),
        Wanted(level=ServiceLevel(tpot_ms=7.0), requests=1),
        Wanted(level=ServiceLevel(ttft_ms=100.0), requests=1),  # as usual, in other words
    ]
    found = {limits: share for share, limits in limits_by_share(wanted, usual, times, 1, 1)}
    usual_limits = usual.limits(times, 1, 1)
    assert found == {
        usual_limits: 0.75,
        LatencyLimits(ttft_ms=100.0, tpot_ms=7.0): 0.25,
    }
    assert limits_by_share([], usual, times, 1, 1) == ((1.0, usual_limits),)


def test_for_requests_that_nobody_waits_for_nothing_is_dropped() -> None:
    state = overloaded(COMPUTING_IS_SHORT)
    with pytest.raises(NoPlan, match="not memory is short but computing"):
        dropped(wanting(state, unnamed=60))
    with pytest.raises(NoPlan, match="requests that queue keep their limits"):
        dropped(wanting(state, patient=60))


def test_it_is_said_who_wants_what() -> None:
    state = overloaded(MEMORY_IS_SHORT)
    plain = dropped(wanting(state, unnamed=60)).decision
    mixed = dropped(wanting(state, unnamed=45, patient=15)).decision
    assert not any(name.startswith("share_with") for name in plain.inputs)
    shares = {name: v for name, v in mixed.inputs.items() if name.startswith("share_with")}
    assert shares.pop("share_with_1000000000_ms_and_1000000000_ms_a_token") == 0.25
    assert list(shares.values()) == [0.75]
    # The patient ones keep their limits in any case.
    queue, alone = mixed.choices[0].attainment, plain.choices[0].attainment
    assert queue is not None
    assert alone is not None
    assert queue == pytest.approx(0.25 + 0.75 * alone)


def test_a_bound_is_set_for_those_who_gain_by_it() -> None:
    """Not where all have time, and not for limits that nobody can keep: everybody would wait."""
    state = flooded(running=4, waiting=10, costs=SHARING_PAYS)
    limit = expected(1.15 * 30 * (1.0 + 8 * 0.25))  # of a token, of eight requests at once
    bounded = Bounds().look(state, limit)
    assert set(bounded) == {0, 1}
    assert all(4 <= most <= 8 for most in bounded.values())
    assert Bounds().look(wanting(state, unnamed=9, hasty=1), limit) == bounded
    assert Bounds().look(wanting(state, patient=10), limit) == {}
    assert Bounds().look(wanting(state, hasty=10), limit) == {}


def test_what_is_held_back_does_not_hide_what_is_wanted() -> None:
    state = wanting(overloaded(MEMORY_IS_SHORT), patient=3)
    assert with_held(state, 5).wanted == state.wanted
