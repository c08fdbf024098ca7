"""Metrics against values computed by hand."""

from __future__ import annotations

import math

import pytest

from benchmark.client import RequestResult
from benchmark.metrics import Slo, slo_from, summarise


def result(index: int, sent: float, ttft: float, e2e: float, tokens: int) -> RequestResult:
    gaps = [(e2e - ttft) / (tokens - 1)] * (tokens - 1)
    return RequestResult(
        index, 10, sent_s=sent, ttft_s=ttft, e2e_s=e2e, output_tokens=tokens, itl_s=gaps
    )


RESULTS = [
    result(0, 1.0, 0.5, 2.5, 5),  # TPOT 0.5
    result(1, 2.0, 1.5, 4.5, 4),  # TPOT 1.0
    result(2, 3.0, 1.0, 8.0, 8),  # TPOT 1.0
    RequestResult(3, 99, sent_s=4.0, e2e_s=0.1, output_tokens=3, error="cut off"),
]


def test_totals_and_rates() -> None:
    summary = summarise(RESULTS, Slo(ttft_s=1.0, tpot_s=1.0))

    assert summary["duration"] == 10.0  # from 1.0 to 3.0 + 8.0
    assert (summary["completed"], summary["failed"]) == (3, 1)
    assert summary["request_throughput"] == pytest.approx(0.3)
    assert summary["input_throughput"] == pytest.approx(3.0)
    assert summary["output_throughput"] == pytest.approx(1.7)
    assert summary["total_throughput"] == pytest.approx(4.7)


def test_latencies() -> None:
    summary = summarise(RESULTS, Slo(ttft_s=1.0, tpot_s=1.0))

    assert summary["mean_ttft_ms"] == pytest.approx(1000)
    assert summary["median_ttft_ms"] == pytest.approx(1000)
    assert summary["std_ttft_ms"] == pytest.approx(1000 * math.sqrt(1 / 6))
    assert summary["p90_ttft_ms"] == pytest.approx(1400)  # 1.0 + 0.8 * 0.5
    assert summary["p99_ttft_ms"] == pytest.approx(1490)
    assert summary["mean_tpot_ms"] == pytest.approx(2500 / 3)
    assert summary["mean_itl_ms"] == pytest.approx((4 * 0.5 + 3 * 1.0 + 7 * 1.0) / 14 * 1e3)
    assert summary["median_e2e_latency_ms"] == pytest.approx(4500)


def test_a_failed_request_misses_its_slo() -> None:
    summary = summarise(RESULTS, Slo(ttft_s=1.0, tpot_s=1.0))

    assert summary["slo_attainment"] == 0.5
    assert summary["goodput"] == pytest.approx(0.2)
    assert summarise(RESULTS, Slo(1.0, 0.9))["slo_attainment"] == 0.25


def test_an_slo_is_a_multiple_of_the_unloaded_median() -> None:
    assert slo_from(RESULTS, 5.0) == Slo(ttft_s=5.0, tpot_s=5.0)


def test_the_keys_are_those_of_bench_serving() -> None:
    expected = {
        "duration",
        "completed",
        "request_throughput",
        "input_throughput",
        "output_throughput",
        "total_throughput",
        *(
            f"{which}_{what}_ms"
            for which in ("mean", "median", "std", "p90", "p95", "p99")
            for what in ("ttft", "tpot", "itl", "e2e_latency")
        ),
    }

    assert expected <= summarise(RESULTS, Slo(1.0, 1.0)).keys()


@pytest.mark.parametrize("results", [[], RESULTS[3:]])
def test_nothing_succeeded(results: list[RequestResult]) -> None:
    summary = summarise(results, Slo(1.0, 1.0))

    assert summary["completed"] == 0
    assert summary["output_throughput"] == 0.0
    assert math.isnan(summary["p99_ttft_ms"])
