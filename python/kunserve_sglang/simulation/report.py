"""Outcomes as figures for programs and as tables for people."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import msgspec
import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kunserve_sglang.core.messages import TransitionKind
from kunserve_sglang.simulation.result import SimulationResult

_PERCENTILES = {"median": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "p999": 99.9}
_SHOWN = (("P50", "median"), ("P90", "p90"), ("P99", "p99"), ("P99.9", "p999"))


class Slo(msgspec.Struct, frozen=True, kw_only=True):
    """At least the share `attainment` of all requests gets its first token within `ttft_s`."""

    ttft_s: float
    attainment: float = 0.99


def summarise(result: SimulationResult, slo: Slo | None = None) -> dict[str, Any]:
    """Figures of one run under the keys of `sglang.bench_serving`, and what is ours."""
    done = [job for job in result.jobs if not job.failed]
    duration = result.duration_s
    prompts = sum(job.prompt for job in done)
    outputs = sum(job.output for job in done)

    def rate(count: float) -> float:
        return count / duration if duration else 0.0

    ttft = np.array([job.ttft for job in done])
    figures: dict[str, Any] = {
        "instances": result.instances,
        "policy": result.policy,
        "duration": duration,
        "completed": len(done),
        "failed": len(result.jobs) - len(done),
        "refused": result.refused,
        "total_input_tokens": prompts,
        "total_output_tokens": outputs,
        "request_throughput": rate(len(done)),
        "input_throughput": rate(prompts),
        "output_throughput": rate(outputs),
        "total_throughput": rate(prompts + outputs),
        **_latency("ttft", ttft),
        **_latency("tpot", np.array([job.tpot for job in done if job.output > 1])),
        **_latency("e2e_latency", np.array([job.end - job.arrival for job in done])),
        "drops": len(result.committed(TransitionKind.DROP)),
        "restores": len(result.committed(TransitionKind.RESTORE)),
        "rebalances": len(result.committed(TransitionKind.REBALANCE)),
        "cooperative_instance_s": result.cooperative_s,
        "retractions": result.retractions,
        "capacity": result.capacity,
        "capacity_peak": max((s.slots_capacity for s in result.samples), default=result.capacity),
        "simulation_s": result.wall_s,
        "simulated_steps": result.steps,
    }
    if slo is not None:
        within = int((ttft <= slo.ttft_s).sum())
        attained = within / len(result.jobs) if result.jobs else 0.0
        figures |= {"slo_ttft_ms": 1e3 * slo.ttft_s, "slo_attainment": attained}
        figures["slo_met"] = attained >= slo.attainment
    return figures


def _latency(name: str, seconds: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, float | None]:
    """Mean and percentiles in milliseconds; None without a single value."""
    if not len(seconds):
        return {f"{which}_{name}_ms": None for which in ("mean", *_PERCENTILES)}
    values = np.percentile(1e3 * seconds, list(_PERCENTILES.values()))
    figures: dict[str, float | None] = {f"mean_{name}_ms": float(1e3 * seconds.mean())}
    figures |= {
        f"{which}_{name}_ms": float(v) for which, v in zip(_PERCENTILES, values, strict=True)
    }
    return figures


def needed(runs: Sequence[Mapping[str, Any]]) -> dict[str, int | None]:
    """The fewest instances of the sweep that meet the SLO, by policy; None if no number does.

    A number counts only if every larger one meets it as well.
    """
    found: dict[str, int | None] = {}
    for policy in dict.fromkeys(str(run["policy"]) for run in runs):
        found[policy] = None
        mine = sorted((r for r in runs if r["policy"] == policy), key=lambda r: -r["instances"])
        for run in mine:
            if not run["slo_met"]:
                break
            found[policy] = int(run["instances"])
    return found


def savings(runs: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """What dropping saves: instances, and instance-seconds over the trace.

    None if the sweep does not tell: without both policies, or if one of them never meets the SLO.
    """
    counts = needed(runs)
    with_drop, without = counts.get("drop"), counts.get("none")
    if with_drop is None or without is None:
        return None
    duration = max(float(run["duration"]) for run in runs if run["instances"] == without)
    saved = without - with_drop
    return {
        "instances": saved,
        "instance_seconds": saved * duration,
        "share": saved / without,
    }


def to_json(
    results: Sequence[SimulationResult], slo: Slo | None, setup: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything there is to know of a sweep but single requests."""
    runs = [summarise(result, slo) for result in results]
    figures: dict[str, Any] = {"setup": dict(setup), "runs": runs}
    if slo is not None:
        figures["slo_share"] = slo.attainment
        figures["needed"] = needed(runs)
        figures["saved"] = savings(runs)
    figures["events"] = [
        {
            "instances": r.instances,
            "policy": r.policy,
            "events": [msgspec.to_builtins(e) for e in r.events],
        }
        for r in results
        if r.events
    ]
    figures["timelines"] = [
        {
            "instances": r.instances,
            "policy": r.policy,
            "samples": [asdict(s) for s in r.samples],
        }
        for r in results
    ]
    return figures


def table(figures: Mapping[str, Any]) -> RenderableType:
    """A column a run."""
    runs = figures["runs"]
    grid = Table(title="Simulated", title_justify="left")
    grid.add_column("instances\npolicy", no_wrap=True)
    for run in runs:
        grid.add_column(f"{run['instances']}\n{run['policy']}", justify="right")
    for what in ("ttft", "tpot"):
        for label, which in _SHOWN:
            values = (_ms(run[f"{which}_{what}_ms"]) for run in runs)
            grid.add_row(f"{what.upper()} {label}", *values)
        grid.add_section()
    grid.add_row("output tok/s", *(f"{run['output_throughput']:,.0f}" for run in runs))
    grid.add_row("drops, restores", *(f"{run['drops']}, {run['restores']}" for run in runs))
    if "needed" in figures:
        grid.add_row("TTFT within SLO", *(_share(run["slo_attainment"]) for run in runs))
    return Group(grid, Text("\n".join(_answer(figures))))


def _answer(figures: Mapping[str, Any]) -> list[str]:
    """The sweep in sentences."""
    runs = figures["runs"]
    lines = ["TTFT and TPOT in milliseconds, from 10 s on in seconds."]
    lost = [r for r in runs if r["refused"] or r["failed"]]
    if lost:
        worst = max(lost, key=lambda r: int(r["refused"] + r["failed"]))
        lines.append(
            f"{worst['refused']} requests are longer than an instance's slots and were left out; "
            f"up to {max(int(r['failed']) for r in lost)} were given up for lack of slots."
        )
    for policy, count in figures.get("needed", {}).items():
        slo = f"TTFT within {runs[0]['slo_ttft_ms']:,.0f} ms"
        slo += f" of {figures['slo_share']:.0%} of all requests"
        lines.append(
            f"{policy}: {counted(count)} for {slo}."
            if count is not None
            else f"{policy}: no number in this sweep is enough for {slo}."
        )
    saved = figures.get("saved")
    if saved and saved["instances"] > 0:
        lines.append(
            f"Dropping saves {counted(saved['instances'])} ({saved['share']:.0%}), "
            f"{saved['instance_seconds'] / 3600:,.1f} instance-hours over this trace."
        )
    return lines


def _ms(value: float | None) -> str:
    if value is None:
        return "-"
    if value >= 1e4:
        return f"{value / 1e3:,.0f} s"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _share(value: float) -> str:
    return "100%" if value == 1.0 else f"{math.floor(1e3 * value) / 10:.1f}%"


def counted(instances: int) -> str:
    return "1 instance" if instances == 1 else f"{instances:,} instances"
