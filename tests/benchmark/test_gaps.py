"""How long requests stood still, from the times of their tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest

from benchmark.client import RequestResult
from benchmark.gaps import Gap, gaps, percentile_ms, stall, within
from benchmark.rounds import Round
from benchmark.transitions import admission_ms, restore_cost


def result(*gaps_s: float, sent: float = 0.0, ttft: float = 1.0, error: str = "") -> RequestResult:
    return RequestResult(
        0,
        8,
        sent_s=sent,
        ttft_s=ttft,
        e2e_s=ttft + sum(gaps_s),
        output_tokens=len(gaps_s) + 1,
        gaps_s=list(gaps_s),
        error=error,
    )


def test_gaps_follow_one_another_from_the_first_token_on() -> None:
    found = gaps(result(0.5, 0.25, sent=2.0, ttft=1.0))
    assert found == [Gap(3.0, 3.5), Gap(3.5, 3.75)]
    assert [g.length_s for g in found] == [0.5, 0.25]
    assert gaps(result()) == []


def test_a_stall_is_the_worst_of_all_requests() -> None:
    quick, slow = result(0.1, 0.1, 0.8), result(1.0, 1.0, 2.0)
    worst = stall([quick, slow])
    assert worst.longest_s == 2.0
    assert worst.worst_ratio == pytest.approx(8.0)


def test_a_stall_within_a_time_span_is_against_all_gaps() -> None:
    running = result(0.1, 0.1, 2.0, 0.1, 0.5, 0.1)  # tokens at 1, 1.1, 1.2, 3.2, 3.3, 3.8, 3.9
    assert stall([running], 3.25, 3.5).longest_s == pytest.approx(0.5)
    assert stall([running], 3.25, 3.5).worst_ratio == pytest.approx(5.0)
    assert math.isnan(stall([running], 7.0, 8.0).longest_s)


def test_requests_without_gaps_or_with_errors_stall_nobody() -> None:
    assert math.isnan(stall([result(), result(9.0, error="lost")]).worst_ratio)
    assert stall([result(0.5), result(9.0, error="lost")]).longest_s == 0.5


def test_gaps_of_a_time_span_touch_it() -> None:
    running = result(1.0, 1.0, 1.0, sent=0.0, ttft=1.0)  # tokens at 1, 2, 3, 4
    assert [g.start_s for g in within([running], 2.5, 2.6)] == [2.0]
    assert [g.start_s for g in within([running], 1.5, 3.5)] == [1.0, 2.0, 3.0]
    assert within([running], 5.0, 6.0) == []
    assert within([running], 4.0, 6.0) == []


def test_percentiles_are_in_milliseconds() -> None:
    assert percentile_ms([Gap(0.0, 0.1), Gap(0.0, 0.3)], 50) == pytest.approx(200)
    assert math.isnan(percentile_ms([], 99))


def test_a_restore_is_compared_with_the_time_before_it() -> None:
    steady = [0.1] * 20
    running = result(*steady, 0.5, *steady, sent=0.0, ttft=1.0)
    load = Round([running], began=1000.0)
    cost = restore_cost(load, {"time": 1003.05, "duration_ms": 300.0})
    assert cost.gap_before == pytest.approx(100)
    assert cost.tpot_before == pytest.approx(100)
    assert cost.gap_during == pytest.approx(500, rel=0.01)
    assert cost.tpot_during == pytest.approx(500)


def test_admission_counts_from_the_end_of_running_steps() -> None:
    def span(name: str, start_ms: float, length_ms: float, **args: int) -> dict[str, Any]:
        return {
            "ph": "X", "name": name, "ts": 1e3 * start_ms, "dur": 1e3 * length_ms, "args": args
        }  # fmt: skip

    recording: dict[str, Any] = {
        "otherData": {"began": 1000.0},
        "traceEvents": [
            {"ph": "M", "name": "process_name", "args": {}},
            span("step", 60, 70),
            span("step", 90, 60),
            span("exchange", 160, 20),
            span("own layers", 185, 10, decode=1),
            span("own layers", 200, 10, decode=0),
        ],
    }
    assert admission_ms(recording, {"time": 1000.1}) == pytest.approx(50)
    assert admission_ms(recording, {"time": 1000.01}) == pytest.approx(190)
    recording["traceEvents"].pop()
    assert math.isnan(admission_ms(recording, {"time": 1000.1}))
