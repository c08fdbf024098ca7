"""The benchmark of tenants: instances that batch, and a case from beginning to end."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec

from benchmark.tenants import CASES, MEMORY, PROFILE, all_checks, measure
from kunserve_sglang.simulation.cluster_profile import load_profile


def test_a_flood_and_what_the_other_gets_beside_it() -> None:
    profile = msgspec.structs.replace(load_profile(Path(PROFILE)), memory_budget=MEMORY)
    case = next(c for c in CASES if c.name == "flood, tenants")
    row = asyncio.run(measure(case, profile, seconds=2.0, seed=1))
    assert row["requests"] > 0
    assert row["tokens_per_s"] > 0
    assert row["ttft_p50_ms"] <= row["ttft_p99_ms"]


def test_checks_say_what_has_to_hold() -> None:
    rows = {c.name: {"case": c.name, "tokens_per_s": 100, "ttft_p99_ms": 100} for c in CASES}
    rows["flood, nobody told apart"]["ttft_p99_ms"] = 900
    rows["two floods, weights 3 to 1"]["ratio"] = 3
    assert all(found["ok"] for found in all_checks(rows))
    rows["flood, tenants"]["ttft_p99_ms"] = 140
    assert [c["value"] for c in all_checks(rows) if not c["ok"]] == [1.4]
