"""Checks are met or not, and results of parts come together without losing other parts."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from benchmark.checks import (
    Section,
    at_least,
    at_most,
    check,
    check_table,
    conclude,
    failed,
    merge,
)

NAN = float("nan")


@pytest.mark.parametrize(
    ("value", "least", "most"),
    [(0.9, False, True), (1.0, True, True), (1.1, True, False), (NAN, False, False)],
)
def test_a_bar_is_met_up_to_its_edge(value: float, least: bool, most: bool) -> None:
    assert at_least(1, "x", value, 1.0).ok is least
    assert at_most(1, "x", value, 1.0).ok is most
    assert at_least(1, "x", value, 1.0).bar == ">= 1"
    assert at_most(1, "x", value, 0.08).bar == "<= 0.08"


def section(point: int, value: float) -> Section:
    return Section({"figure": value}, (at_least(point, f"p{point}", value, 1.0),))


def rows(value: float) -> Section:
    return Section({"rows": [{"name": "a", "ttft_p99_ms": value}]}, ())


def test_parts_are_put_together() -> None:
    results = merge({}, {"b": section(2, 1.5), "a": section(1, 0.5)}, {"machine": "m"})
    assert results["machine"] == "m"
    assert results["rows"] == []
    assert results["sections"] == {"a": {"figure": 0.5}, "b": {"figure": 1.5}}
    assert [(c["section"], c["point"], c["ok"]) for c in results["checks"]] == [
        ("a", 1, False),
        ("b", 2, True),
    ]
    assert [c["what"] for c in failed(results["checks"])] == ["p1"]


def test_a_part_that_is_run_again_replaces_only_itself() -> None:
    old = merge({}, {"a": section(1, 0.5), "b": section(2, 0.5), "rows": rows(1.0)}, {"setup": 1})
    new = merge(old, {"a": section(1, 2.0)}, {"setup": 2})
    assert new["setup"] == 2
    assert new["rows"] == old["rows"]
    assert new["sections"]["b"] == old["sections"]["b"]
    assert [(c["section"], c["value"]) for c in new["checks"]] == [("a", 2.0), ("b", 0.5)]
    newer = merge(new, {"rows": rows(3.0)}, {"setup": 3})
    assert newer["rows"] == [{"name": "a", "ttft_p99_ms": 3.0}]
    assert newer["sections"] == new["sections"]
    assert newer["checks"] == new["checks"]


def test_the_table_says_what_failed() -> None:
    checks: list[dict[str, Any]] = [
        {"point": 1, "what": "fast", "value": 1.25, "bar": ">= 1", "ok": True},
        {"point": 2, "what": "slow", "value": 3.0, "bar": "<= 1", "ok": False},
        {"point": 3, "what": "none", "value": None, "bar": "<= 1", "ok": False},
    ]
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(check_table(checks))
    found = [line.split() for line in console.export_text().splitlines() if line.strip()]
    lines = {words[0]: words[1:] for words in found}
    assert lines["1"] == ["fast", "1.25", ">=", "1", "ok"]
    assert lines["2"] == ["slow", "3", "<=", "1", "failed"]
    assert lines["3"] == ["none", "not", "measured", "<=", "1", "failed"]


def test_one_failed_check_is_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    met, unmet = check("time, ms", 5, most=5), check("rate", 0.6, least=0.7)
    assert conclude([met], Console()) == 0
    assert conclude([met, unmet], Console()) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "NOT rate: 0.6 >= 0.7"
