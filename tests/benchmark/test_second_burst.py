"""What the demo tells of its second burst."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from benchmark import second_burst
from benchmark.client import RequestResult
from benchmark.experiment import Run
from benchmark.metrics import Slo
from benchmark.timeline import Timeline

LIMITS = Slo(ttft_s=1.0, tpot_s=0.5)
DROP = {"kind": "drop", "status": "committed", "error": "", "reason": "memory is short"}
DECLINED = {"kind": "drop", "status": "declined", "error": "not memory is short", "reason": ""}
RESTORE = {"kind": "restore", "status": "committed", "error": "", "reason": "demand is low"}


def run(ttft_s: list[float], events: list[dict[str, Any]] | None = None) -> Run:
    results = [
        RequestResult(i, 1, sent_s=i, ttft_s=t, e2e_s=t + 1, output_tokens=3, itl_s=[0.1] * 2)
        for i, t in enumerate(ttft_s)
    ]
    return Run(results, Timeline([]), 200, 200, 200, 1.0, 0.0, events=events or [])


def bursts(second_ttft_s: list[float]) -> dict[str, Any]:
    first = run([3.0, 3.0]), run([0.5, 0.5], [DROP, RESTORE])
    second = run([0.5, 2.0]), run(second_ttft_s, [DROP, RESTORE, DECLINED])
    return second_burst.to_json(first, second, LIMITS)


def test_each_burst_has_its_own_decision() -> None:
    found = bursts([0.5, 0.5])
    memory, computing = found["memory is short"], found["computing is short"]
    assert (memory["drops"], memory["why"]) == (1, "memory is short")
    assert (computing["drops"], computing["why"]) == (0, "not memory is short")
    assert memory["baseline"]["slo_attainment"] == 0
    assert memory["kunserve"]["slo_attainment"] == 1


@pytest.mark.parametrize(("second", "worse"), [([0.5, 2.0], False), ([2.0, 2.0], True)])
def test_it_says_whether_it_was_worse_than_without(second: list[float], worse: bool) -> None:
    assert second_burst.is_worse(bursts(second)) is worse


def test_the_table_says_what_was_decided_and_why() -> None:
    console = Console(width=120, record=True)
    console.print(second_burst.table(bursts([0.5, 0.5])))
    shown = console.export_text()
    assert "computing is short: not memory is short." in shown
    assert "50% -> 100%" in shown
    assert "TTFT 1,000 ms" in shown


def test_limits_are_those_that_the_cluster_promises() -> None:
    assert second_burst.promised({"service": {"ttft_ms": 1000.0, "tpot_ms": 500.0}}) == LIMITS
