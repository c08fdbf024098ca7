"""What is claimed beside other servers."""

from __future__ import annotations

import pytest

from benchmark.peers import ORACLE, OTHER, OURS, UPSTREAM, Row, checks_of


def row(way: str, load: str, attainment: float, ttft: float, failed: int = 0) -> Row:
    return {
        "load": load,
        "way": way,
        "failed": failed,
        "slo_attainment": attainment,
        "p99_ttft_ms": ttft,
    }


def verdicts(load: str, attainment: float, ttft: float, failed: int = 0) -> list[bool]:
    """Of ours beside one of 0.6 and one of 900 ms; the oracle does not count."""
    rows = [
        row(OURS, load, attainment, ttft, failed),
        row(UPSTREAM, load, 0.6, 2000.0),
        row(OTHER, load, 0.5, 900.0),
        row(ORACLE, load, 1.0, 10.0),
    ]
    return [check["ok"] for check in checks_of(rows)]


@pytest.mark.parametrize(
    ("attainment", "ttft", "failed", "ok"),
    [
        (0.6, 900.0, 0, [True, True, True]),
        (0.59, 900.0, 0, [True, False, True]),
        (0.7, 901.0, 0, [True, True, False]),
        (0.7, 100.0, 1, [False, True, True]),
    ],
)
def test_where_memory_is_short_ours_is_the_best(
    attainment: float, ttft: float, failed: int, ok: list[bool]
) -> None:
    assert verdicts("memory-bound, long", attainment, ttft, failed) == ok


def test_elsewhere_ours_is_within_noise_of_the_best() -> None:
    assert verdicts("prompt-heavy", 0.51, 980.0) == [True, True, True]
    assert verdicts("prompt-heavy", 0.49, 1000.0) == [True, False, False]


def test_nothing_is_claimed_without_others_or_without_ours() -> None:
    assert checks_of([row(OURS, "fits", 1.0, 1.0), row(ORACLE, "fits", 1.0, 1.0)]) == []
    assert checks_of([row(UPSTREAM, "fits", 1.0, 1.0)]) == []
