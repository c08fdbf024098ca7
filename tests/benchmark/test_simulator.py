"""The comparison of simulated with real runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmark import simulator
from benchmark.client import RequestResult
from benchmark.simulator_picture import draw
from benchmark.simulator_profile import to_toml
from kunserve_sglang.simulation import load_profile
from kunserve_sglang.simulation.traces import TraceRow
from tests.support.simulated import profile

ROWS = [TraceRow(0.05 * i, 40, 10) for i in range(100)]


def real_run(factor: float) -> list[RequestResult]:
    """What a cluster would have measured that is `factor` times as slow as its simulation."""
    outcome = simulator.simulate(profile(), 2, "none", ROWS)
    return [
        RequestResult(j.index, j.prompt, j.arrival, factor * j.ttft, 2 * j.ttft, j.output)
        for j in outcome.jobs
    ]


def test_errors_are_relative_to_what_was_measured() -> None:
    outcome = simulator.simulate(profile(), 2, "none", ROWS)
    rows = simulator.compare(real_run(2.0), outcome)
    assert [row["what"] for row in rows] == ["P50 TTFT", "P99 TTFT"]
    assert [row["error"] for row in rows] == pytest.approx([0.5, 0.5])
    assert not any(check["ok"] for check in simulator.checks(rows, None))


def test_checks_hold_for_a_perfect_prediction_and_a_fast_run() -> None:
    rows = simulator.compare(real_run(1.0), simulator.simulate(profile(), 2, "none", ROWS))
    for wall_s, ok in ((100.0, True), (1000.0, False)):
        *errors, hour = simulator.checks(rows, {"instances": 1000, "wall_s": wall_s})
        assert all(check["ok"] for check in errors)
        assert hour["ok"] is ok
        assert simulator.table([*errors, hour]).row_count == 3


def test_a_run_without_answers_is_no_comparison() -> None:
    failed = [RequestResult(0, 1, 0.0, error="gone")]
    with pytest.raises(ValueError, match="no request"):
        simulator.compare(failed, simulator.simulate(profile(), 2, "none", ROWS))


def test_the_picture(tmp_path: Path) -> None:
    run = {
        "instances": 2,
        "policy": "none",
        "measured_ttft_s": [0.1, 0.4, 0.2],
        "simulated_ttft_s": [0.1, 0.3],
    }
    draw([run, run], tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 10_000


def test_a_profile_survives_being_written(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text(to_toml(profile(), 'said "so"'))
    assert load_profile(tmp_path / "p.toml") == profile()
