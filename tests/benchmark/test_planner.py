"""The planner's benchmark: its brute force, its rows and checks, its picture."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from benchmark import planner
from benchmark.growth import draw_growth
from kunserve_sglang.testing.exhaustive_planner import (
    StageCounts,
    every_outcome,
    partitions,
    stages_of,
)
from tests.support.clusters import cluster


def test_all_partitions_are_there_once() -> None:
    for size, bell in enumerate((1, 1, 2, 5, 15, 52, 203)):
        found = list(partitions(list(range(size))))
        assert len(found) == bell
        assert len({frozenset(frozenset(part) for part in p) for p in found}) == bell
        assert all(sorted(i for part in p for i in part) == list(range(size)) for p in found)


def test_outcomes_of_three_instances() -> None:
    state = cluster(3)
    outcomes = every_outcome(state, 3)
    assert sorted(o.stages for o in outcomes) == [
        StageCounts(3, 0),
        *[StageCounts(5, 2)] * 3,
        StageCounts(9, 3),
    ]
    gains = {o.stages: o.gained for o in outcomes}
    assert gains[StageCounts(3, 0)] == 0 < gains[StageCounts(5, 2)] < gains[StageCounts(9, 3)]
    assert {o.stages.longest for o in every_outcome(state, 2)} == {0, 2}
    assert stages_of(state.groups(), ()) == StageCounts(3, 0)
    with pytest.raises(ValueError, match="too many ways"):
        every_outcome(cluster(9), 2)


def test_rows_and_checks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(planner, "SIZES", (8, 10_000))
    rows = planner.growth(1, random.Random(1))
    assert len(rows) == 2 * 2 * 4
    assert all(0 < r["least_ms"] <= r["median_ms"] <= r["most_ms"] for r in rows)
    checks = planner.speed_checks(rows)
    assert len(checks) == 8
    draw_growth(rows, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_a_check_holds_or_not() -> None:
    assert planner.check("", 1.0, most=1)["ok"]
    assert not planner.check("", 1.1, most=1)["ok"]
    assert planner.check("", 1.0, least=1)["ok"]
    assert not planner.check("", 0.9, least=1)["ok"]


def test_plans_are_held_against_all() -> None:
    row = planner.against_all(random.Random(1), name="", cases=5, layers=(840,), mixed=False)
    assert (row["equal"], row["longer"], row["short"]) == (5, 0, 0)
