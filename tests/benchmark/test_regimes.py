"""Every regime, and what is claimed of the decisions in it: these are the simulator's tests too."""

from __future__ import annotations

import json

import pytest

from benchmark import regimes
from benchmark.program import ROOT
from benchmark.regimes import POLICIES, REGIMES, Regime, Row
from kunserve_sglang.core.choices import OverloadPolicy

WRITTEN = ROOT / "benchmark" / "results" / "regimes.json"


def name_of(regime: Regime) -> str:
    return f"{regime.profile}, {regime.name}"


@pytest.mark.parametrize("regime", REGIMES, ids=name_of)
def test_by_service_level_it_is_never_worse_than_the_better_way(regime: Regime) -> None:
    profile = regimes.machines()[regime.profile]
    rows = [regimes.run_one(regime, profile, policy) for policy in POLICIES]
    checks = regimes.checks_of(rows)
    assert len(checks) == 2 + regime.memory_bound
    assert [c for c in checks if not c["ok"]] == []


def row(policy: OverloadPolicy, attainment: float, ttft: float, e2e: float) -> Row:
    regime = REGIMES[1]
    return {
        "profile": regime.profile,
        "regime": regime.name,
        "policy": policy.value,
        "slo_attainment": attainment,
        "p99_ttft_ms": ttft,
        "median_e2e_ms": e2e,
    }


def test_checks_fail_where_it_is_worse() -> None:
    never, always = row(POLICIES[0], 0.5, 2000, 100), row(POLICIES[1], 0.9, 100, 100)
    good = regimes.checks_of([never, always, row(POLICIES[2], 0.89, 150, 104)])
    assert [c["ok"] for c in good] == [True, True, True]
    bad = regimes.checks_of([never, always, row(POLICIES[2], 0.87, 250, 106)])
    assert [c["ok"] for c in bad] == [False, False, False]
    assert regimes.checks_of([never, always]) == []


def test_the_load_is_the_same_for_every_policy_and_another_for_every_seed() -> None:
    for regime in REGIMES:
        first, again, other = (regime.requests(seed) for seed in (1, 1, 2))
        assert first == again != other
        assert [r.arrival_s for r in first] == sorted(r.arrival_s for r in first)


def test_what_was_written_holds_and_is_of_these_regimes() -> None:
    results = json.loads(WRITTEN.read_text())
    assert {(r["profile"], r["regime"]) for r in results["rows"]} == {
        (r.profile, r.name) for r in REGIMES
    }
    assert len(results["rows"]) == len(REGIMES) * len(POLICIES)
    assert all(c["ok"] for c in results["checks"])
