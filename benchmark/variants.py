"""The rows of the ablation: one feature more in each, on a window of a real trace."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from benchmark.bench import NUM_INSTANCES, Bench
from benchmark.checks import Check, Section, at_least, at_most
from benchmark.display import RunDisplay
from benchmark.experiment import Run, run_workload, warm_up_requests
from benchmark.gaps import stall
from benchmark.metrics import Slo, summarise
from benchmark.timeline import bubble_fraction
from benchmark.traces import load_trace, scale, to_requests, window
from benchmark.workload import Workload
from kunserve_sglang.testing.cluster import Cluster
from kunserve_sglang.testing.upstream import UpstreamCluster

UPSTREAM, ALL, ORACLE = "upstream", "+ restore", "oracle"
_RESTORE_TIMEOUT_S = 20.0
_MIN_GAIN = 10.0
_MAX_BEHIND_ORACLE = 1.5
_NO_SLO = Slo(math.inf, math.inf)


@dataclass(frozen=True, slots=True)
class TraceWindow:
    """Which part of a trace is sent, and how its rows are scaled."""

    start_s: float
    length_s: float
    time: float
    prompt: float
    output: float
    max_total: int


WINDOW = TraceWindow(
    start_s=1190.0, length_s=12.0, time=6.0, prompt=0.06, output=0.6, max_total=600
)
"""Of the Azure 2023 conversation trace: 90 requests. A burst in it needs three times the slots of
two instances of the default budget, and two thirds of what they have after a drop; before and after
it, all fit. Time is stretched to what two cores can compute, so that memory is what is short: with
enough of it (the oracle) nobody waits. Lengths are shortened for a model with an eighth of the
usual context, prompts more than answers, since on a core a token of a prompt costs more."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One row; without `flags` it is no KunServe that acts."""

    name: str
    flags: tuple[str, ...] = ()

    @property
    def restores(self) -> bool:
        return self.name == ALL


_DROP = ("--restore-threshold", "0")
_ONE, _LOOKAHEAD = ("--micro-batches", "one"), ("--micro-batches", "lookahead")
_STOP, _COORDINATED = ("--exchange", "stop"), ("--exchange", "coordinated")
VARIANTS = (
    Variant(UPSTREAM),
    Variant("drop", (*_DROP, *_ONE, *_STOP)),
    Variant("+ coordinated exchange", (*_DROP, *_ONE, *_COORDINATED)),
    Variant("+ lookahead", (*_DROP, *_LOOKAHEAD, *_COORDINATED)),
    Variant(ALL, (*_LOOKAHEAD, *_COORDINATED)),
    Variant(ORACLE),
)


@dataclass(frozen=True, slots=True)
class Rows:
    """All runs by the names of their variants, in the order of `VARIANTS`."""

    workload: Workload
    runs: dict[str, Run]

    def section(self) -> Section:
        rows = [{"name": name, **row(run)} for name, run in self.runs.items()]
        return Section({"rows": rows}, tuple(checks(rows)))


def trace_workload(bench: Bench, part: TraceWindow = WINDOW) -> Workload:
    """The requests of the window; prompts are made up."""
    rows = window(load_trace(bench.trace), part.start_s, part.length_s)
    rows = scale(
        rows, prompt=part.prompt, output=part.output, time=part.time, max_total=part.max_total
    )
    return Workload(tuple(to_requests(rows, bench.prompts)), 0.0, 0.0)


def measure(bench: Bench, oracle_budget: str) -> Rows:
    """Every variant on a cluster of its own, one after the other.

    Upstream comes last, because its servers get as many slots as an instance of KunServe had.
    """
    workload = trace_workload(bench)
    runs: dict[str, Run] = {}
    for variant in sorted(VARIANTS, key=lambda v: v.name == UPSTREAM):
        with RunDisplay(variant.name, workload, bench.console) as display:
            if variant.name == UPSTREAM:
                slots = runs[ALL].capacity_before // NUM_INSTANCES
                servers = bench.upstream(slots, on_wait=display.starting)
                run = _run(servers, variant, workload, display)
                run.capacity_before = run.capacity_peak = run.capacity_end = slots * NUM_INSTANCES
            else:
                cluster = bench.kunserve(
                    f"row-{variant.name.replace('+', '').strip().replace(' ', '-')}",
                    *variant.flags,
                    policy="drop" if variant.flags else "none",
                    budget=oracle_budget if variant.name == ORACLE else None,
                    on_wait=display.starting,
                )
                run = _run(cluster, variant, workload, display)
        runs[variant.name] = run
    return Rows(workload, {v.name: runs[v.name] for v in VARIANTS})


def _run(
    cluster: Cluster | UpstreamCluster, variant: Variant, workload: Workload, display: RunDisplay
) -> Run:
    with cluster:
        display.started()
        running = run_workload(
            cluster.url,
            workload,
            warm_up=warm_up_requests("What is a KV cache?", 2 * NUM_INSTANCES),
            restore_timeout_s=_RESTORE_TIMEOUT_S if variant.restores else 0.0,
            on_progress=display.progress,
        )
        try:
            return asyncio.run(running)
        except (aiohttp.ClientError, OSError):
            cluster.check_running()  # its log says more than a lost connection
            raise


def row(run: Run) -> dict[str, Any]:
    """The figures of one variant; latencies in milliseconds, capacities in token slots."""
    summary = summarise(run.results, _NO_SLO)
    latencies = {
        f"{what}_{which}_ms": summary[f"{key}_{what}_ms"]
        for what in ("ttft", "tpot")
        for which, key in (("p50", "median"), ("p90", "p90"), ("p99", "p99"), ("p999", "p999"))
    }
    standstill = stall(run.results)
    return {
        **latencies,
        "output_throughput": summary["output_throughput"],
        "duration_s": summary["duration"],
        "bubble_fraction": bubble_fraction(run.counters),
        "stall_ms": 1e3 * standstill.longest_s,
        "stall_ratio": standstill.worst_ratio,
        "capacity_before": run.capacity_before,
        "capacity_peak": run.capacity_peak,
        "failed": len(run.errors),
        "errors": sorted(set(run.errors)),
        "drops": len(run.committed("drop")),
        "restores": len(run.committed("restore")),
        "noise": run.noise,
    }


def checks(rows: Sequence[dict[str, Any]]) -> list[Check]:
    by_name = {r["name"]: r for r in rows}
    p99 = {name: by_name[name]["ttft_p99_ms"] for name in (UPSTREAM, ALL, ORACLE)}
    return [
        at_least(
            8, "burst: P99 TTFT of upstream / all features", p99[UPSTREAM] / p99[ALL], _MIN_GAIN
        ),
        at_most(
            8,
            "burst: P99 TTFT of all features / oracle",
            p99[ALL] / p99[ORACLE],
            _MAX_BEHIND_ORACLE,
        ),
        at_most(8, "burst: failed requests, all variants", sum(r["failed"] for r in rows), 0),
    ]


def raw(rows: Rows) -> dict[str, Any]:
    """Every request, to draw and count in other ways."""
    return {
        name: [
            {
                "sent_s": r.sent_s,
                "ttft_s": r.ttft_s,
                "tpot_s": r.tpot_s,
                "longest_gap_s": max(r.gaps_s, default=float("nan")),
                "prompt_tokens": r.prompt_len,
                "output_tokens": r.output_tokens,
                "error": r.error,
            }
            for r in run.results
        ]
        for name, run in rows.runs.items()
    }


def queued_at(run: Run, times: np.ndarray[Any, Any]) -> list[int]:
    """Requests sent and without a first token, at each of `times`; the failed ones left out."""
    waits = [(r.sent_s, r.sent_s + r.ttft_s) for r in run.results if r.ok]
    return [sum(sent <= at < first for sent, first in waits) for at in times]


def describe_window(trace: Path, part: TraceWindow = WINDOW) -> dict[str, Any]:
    return {
        "trace": trace.name,
        "window_s": [part.start_s, part.start_s + part.length_s],
        "time_scale": part.time,
        "prompt_scale": part.prompt,
        "output_scale": part.output,
        "max_tokens_of_a_request": part.max_total,
    }
