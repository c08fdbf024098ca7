"""The ablation's own parts: variants, rows, its table and picture, and what it leaves out."""

from __future__ import annotations

import argparse
import io
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from benchmark import ablation
from benchmark.ablation_report import draw, row_table
from benchmark.client import RequestResult
from benchmark.elastic import share
from benchmark.experiment import Run, RunError
from benchmark.report import dumps
from benchmark.rounds import Round, median, requests, spread
from benchmark.timeline import Timeline, bubble_fraction, counters
from benchmark.variants import ALL, ORACLE, UPSTREAM, VARIANTS, Rows, checks, queued_at, raw, row
from benchmark.workload import Shape, Workload


def run(ttft: float, *, error: str = "", busy: int = 0) -> Run:
    results = [
        RequestResult(
            i, 4, sent_s=i, ttft_s=ttft, e2e_s=ttft + 0.4, output_tokens=3, gaps_s=[0.1, 0.3]
        )
        for i in range(3)
    ]
    results[0].error = error
    return Run(
        results,
        Timeline(),
        capacity_before=200,
        capacity_peak=600 if busy else 200,
        capacity_end=200,
        restored_after_s=None,
        noise=0.0,
        events=[{"kind": "drop", "status": "committed"}] if busy else [],
        counters=Counter(busy_ms=busy, bubble_ms=busy // 3),
    )


def rows(upstream: float = 20.0, everything: float = 1.0, oracle: float = 0.9) -> Rows:
    ttfts = {UPSTREAM: upstream, ALL: everything, ORACLE: oracle}
    runs = {v.name: run(ttfts.get(v.name, 2.0), busy=900 if v.flags else 0) for v in VARIANTS}
    return Rows(Workload((), 0.0, 0.0), runs)


def test_each_variant_adds_one_feature() -> None:
    assert (VARIANTS[0].name, VARIANTS[-1].name) == (UPSTREAM, ORACLE)
    featured = [v for v in VARIANTS if v.flags]
    for one, other in pairwise(featured[:-1]):
        assert len(set(other.flags) - set(one.flags)) == 1
    assert "--restore-threshold" in featured[-2].flags
    assert "--restore-threshold" not in featured[-1].flags
    assert featured[-1].name == ALL


def test_a_row_says_what_happened() -> None:
    found = row(run(2.0, busy=900))
    assert found["ttft_p50_ms"] == found["ttft_p999_ms"] == 2000.0
    assert found["tpot_p99_ms"] == pytest.approx(200.0)
    assert found["bubble_fraction"] == 0.25
    assert found["stall_ms"] == pytest.approx(300.0)
    assert found["stall_ratio"] == pytest.approx(1.5)
    assert (found["capacity_before"], found["capacity_peak"]) == (200, 600)
    assert (found["failed"], found["drops"], found["restores"]) == (0, 1, 0)
    assert row(run(2.0, error="lost"))["failed"] == 1
    assert np.isnan(row(run(2.0))["bubble_fraction"])


def test_rows_are_checked_against_upstream_and_the_oracle() -> None:
    section = rows().section()
    assert [r["name"] for r in section.figures["rows"]] == [v.name for v in VARIANTS]
    assert [(c.point, c.ok) for c in section.checks] == [(8, True)] * 3
    gain, behind, _ = rows(upstream=5.0, oracle=0.5).section().checks
    assert (gain.value, gain.ok) == (pytest.approx(5.0), False)
    assert (behind.value, behind.ok) == (pytest.approx(2.0), False)


def test_a_failed_request_fails_a_check() -> None:
    broken = rows()
    broken.runs["drop"].results[1].error = "lost"
    found = checks([{"name": n, **row(r)} for n, r in broken.runs.items()])
    assert (found[2].value, found[2].ok) == (1, False)


def test_the_table_reads_what_the_file_has(tmp_path: Path) -> None:
    measured = rows()
    figures = measured.section().figures["rows"]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(row_table(json.loads(dumps({"rows": figures}))["rows"]))
    text = console.export_text()
    lines = {line[:14].strip(): line[14:].split() for line in text.splitlines()}
    assert lines["slots at most"] == ["200", *["600"] * 4, "200"]
    assert lines["bubbles"] == ["-", *["25.0%"] * 4, "-"]
    assert lines["TTFT P99"] == ["20,000", *["2,000"] * 3, "1,000", "900"]
    draw(measured, figures, tmp_path / "a" / "ablation.png")
    assert (tmp_path / "a" / "ablation.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads(dumps(raw(measured)))["drop"][0]["longest_gap_s"] == 0.3


def test_requests_queue_until_their_first_token() -> None:
    waiting = run(1.5)  # sent at 0, 1 and 2
    assert queued_at(waiting, np.array([0.5, 1.2, 1.6, 3.4, 3.6])) == [1, 2, 1, 1, 0]


def test_counters_are_summed_over_instances() -> None:
    instances: list[dict[str, Any]] = [
        {"counters": {"busy_ms": 3, "bubble_ms": 1}},
        {"counters": {"busy_ms": 4}},
        {"mode": "dead"},
    ]
    total = counters({"instances": instances})
    assert total == {"busy_ms": 7, "bubble_ms": 1}
    assert bubble_fraction(total) == 0.125
    assert np.isnan(bubble_fraction(Counter()))


def test_an_owner_has_its_share_of_all_slots() -> None:
    slots = [{"slots": {"capacity": c}} for c in (300, 100)]
    assert share({"instances": slots}, 0) == 0.75


def test_a_round_is_measured_from_its_first_request_to_its_last_token() -> None:
    results = [
        RequestResult(0, 4, sent_s=1.0, ttft_s=0.5, e2e_s=2.0, output_tokens=10),
        RequestResult(1, 4, sent_s=2.0, ttft_s=1.5, e2e_s=4.0, output_tokens=40),
    ]
    measured = Round(results, began=0.0)
    assert measured.throughput == 10.0
    assert measured.median_ttft_ms == 1000.0
    assert measured.p99_ttft_ms == pytest.approx(1490.0)
    assert (median([1, 5, 2]), spread([1, 5, 2])) == (2, 2)


def test_requests_of_a_round_have_prompts_of_their_own() -> None:
    class Counting:
        def __init__(self) -> None:
            self.next = 0

        def tokens(self, length: int) -> tuple[int, ...]:
            self.next += length
            return tuple(range(self.next - length, self.next))

    load = requests(Counting(), 3, Shape(4, 9), start_s=1.0, every_s=0.5)  # type: ignore[arg-type]
    assert [r.arrival_s for r in load] == [1.0, 1.5, 2.0]
    assert len({r.prompt for r in load}) == 3
    assert {(r.prompt_len, r.output_len) for r in load} == {(4, 9)}


def test_sections_are_named() -> None:
    assert ablation._sections("rows,elastic") == ("rows", "elastic")
    with pytest.raises(argparse.ArgumentTypeError, match="'none'"):
        ablation._sections("rows,none")
    with pytest.raises(argparse.ArgumentTypeError):
        ablation._positive("0")


def test_a_file_that_is_no_json_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "ablation.json"
    assert ablation._read(path) == {}
    path.write_text("{")
    with pytest.raises(RunError, match="not overwritten"):
        ablation._read(path)


def test_the_cost_model_is_read_from_its_own_file(tmp_path: Path) -> None:
    settings = SimpleNamespace(output=tmp_path)
    (missing,) = ablation.cost_model(settings).checks  # type: ignore[arg-type]
    assert (missing.point, missing.ok) == (5, False)
    assert np.isnan(missing.value)
    (tmp_path / "cost_model.json").write_text('{"checks": [{"value": 0.03}]}')
    (check,) = ablation.cost_model(settings).checks  # type: ignore[arg-type]
    assert (check.value, check.ok) == (0.03, True)
