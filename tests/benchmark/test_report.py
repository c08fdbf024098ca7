"""The report of two runs: complete, readable by machines, honest about what went wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmark.client import RequestResult
from benchmark.experiment import Run
from benchmark.metrics import Slo
from benchmark.picture import draw
from benchmark.report import Comparison, dumps, ratios, raw, table, to_json
from benchmark.timeline import Timeline, to_sample
from benchmark.workload import Request, Workload

WORKLOAD = Workload((Request(0.0, "a", 1, 3), Request(1.5, "b", 1, 3)), 1.0, 2.0)


def status(mode: str, used: int, capacity: int) -> dict[str, Any]:
    slots = {"used": used, "cached": 0, "capacity": capacity}
    instance = {"mode": mode, "slots": slots, "running": 1, "waiting": 2}
    return {"transition": None, "instances": [instance, instance, {"mode": "dead"}]}


def transition(kind: str, state: str = "committed") -> dict[str, Any]:
    times = dict.fromkeys(("duration_ms", "stall_ms", "remap_ms"), 1.5)
    sizes = dict.fromkeys(("freed_bytes", "exchanged_bytes", "loaded_bytes"), 1 << 20)
    slots = {"capacity_before": 200, "capacity_after": 600}
    numbers = {**times, **sizes, **slots}
    return {"kind": kind, "status": state, "error": "", **numbers}


def run(ttft: float, kinds: tuple[str, ...] = (), error: str = "") -> Run:
    results = [
        RequestResult(i, 1, sent_s=i, ttft_s=ttft, e2e_s=ttft + 1, output_tokens=3, itl_s=[0.5] * 2)
        for i in range(2)
    ]
    results[1].error = error
    mode = "cooperative" if kinds else "independent"
    samples = [to_sample(status("independent", 50, 100), 0.0)]
    samples += [to_sample(status(mode, 80, 300 if kinds else 100), at) for at in (1.0, 2.0)]
    return Run(
        results,
        Timeline(samples),
        capacity_before=200,
        capacity_peak=600 if kinds else 200,
        capacity_end=200,
        restored_after_s=3.0,
        noise=0.25 if kinds else 0.0,
        events=[transition(kind) for kind in kinds],
    )


def compare(kunserve: Run) -> Comparison:
    return Comparison(WORKLOAD, run(8.0), kunserve, Slo(1.0, 1.0))


def test_a_sample_is_the_sum_of_those_that_report() -> None:
    sample = to_sample(status("cooperative", 50, 100), 4.0)

    assert (sample.running, sample.waiting) == (2, 4)
    assert (sample.slots_used, sample.slots_capacity) == (100, 200)
    assert sample.modes == ("cooperative", "cooperative")
    assert sample.cooperative == 2


def test_the_json_is_complete() -> None:
    figures = json.loads(dumps(to_json(compare(run(2.0, ("drop", "restore"))), {"seed": 1})))

    assert figures.keys() == {
        "kunserve",
        "baseline",
        "ratio",
        "events",
        "failed",
        "machine",
        "workload",
    }
    assert figures["ratio"]["p99_ttft"] == pytest.approx(4.0)
    assert figures["ratio"]["capacity"] == pytest.approx(3.0)
    assert [e["kind"] for e in figures["events"]] == ["drop", "restore"]
    assert figures["workload"]["requests_in_burst"] == 1
    assert figures["workload"]["seed"] == 1
    assert {"cpu", "cores", "memory_gib", "python", "packages"} <= figures["machine"].keys()
    for side in ("baseline", "kunserve"):
        assert {"median_ttft_ms", "p99_tpot_ms", "capacity_peak"} <= figures[side].keys()


def test_the_raw_data_has_every_request_and_sample() -> None:
    comparison = compare(run(2.0, ("drop", "restore")))
    data = json.loads(dumps(raw(comparison), indent=None))

    assert [r["ttft_s"] for r in data["baseline"]["requests"]] == [8.0, 8.0]
    assert [s["slots_capacity"] for s in data["kunserve"]["timeline"]] == [200, 600, 600]


def test_what_was_not_measured_is_null() -> None:
    nothing = run(2.0)
    for result in nothing.results:
        result.error = "refused"

    figures = json.loads(dumps(to_json(compare(nothing), {})))

    assert figures["kunserve"]["p99_ttft_ms"] is None
    assert figures["ratio"]["p99_ttft"] is None
    assert figures["failed"] == 2


def test_better_is_above_one_in_either_direction() -> None:
    baseline = {"p99_ttft_ms": 100.0, "goodput": 2.0, "capacity_peak": 10, "slo_ttft_ms": 1.0}
    kunserve = {"p99_ttft_ms": 50.0, "goodput": 1.0, "capacity_peak": 20, "slo_ttft_ms": 1.0}

    assert ratios(baseline, kunserve) == {"p99_ttft": 2.0, "goodput": 0.5, "capacity": 2.0}


def test_problems_are_named() -> None:
    assert compare(run(2.0, ("drop", "restore"))).problems() == []
    assert compare(run(2.0, ("drop",))).problems() == ["no restore took place"]
    assert compare(run(2.0, ("drop", "restore"), "lost")).problems() == ["1 requests failed"]
    stuck = run(2.0, ("drop", "restore"))
    stuck.restored_after_s = None
    stuck.capacity_end = 600
    assert "600 slots at the end" in compare(stuck).problems()[0]


def test_an_aborted_drop_is_no_drop() -> None:
    aborted = run(2.0, ("drop", "restore"))
    aborted.events[0] = transition("drop", "aborted")

    assert compare(aborted).problems() == ["no drop took place"]


def test_the_table_shows_both_runs() -> None:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(table(to_json(compare(run(2.0, ("drop", "restore"))), {})))
    text = capture.get()

    assert "TTFT P99" in text
    assert "8,000 ms" in text
    assert "2,000 ms" in text
    assert "200 -> 600" in text
    assert "25% of the cores" in text


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "new" / "demo.png"
    draw(compare(run(2.0, ("drop", "restore"))), path)

    assert path.read_bytes().startswith(b"\x89PNG")
