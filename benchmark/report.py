"""The outcome of two runs as a table for people and as JSON for programs."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from benchmark.client import RequestResult
from benchmark.experiment import Run
from benchmark.metrics import Slo, summarise
from benchmark.workload import Workload

_LOWER_IS_BETTER = tuple(
    f"{which}_{what}"
    for what in ("ttft", "tpot", "itl", "e2e_latency")
    for which in ("mean", "median", "p90", "p95", "p99")
)
_HIGHER_IS_BETTER = ("request_throughput", "output_throughput", "goodput", "slo_attainment")
_NOISY = 0.1
_PACKAGES = ("kunserve-sglang", "sglang", "torch", "transformers")


@dataclass(frozen=True, slots=True)
class Comparison:
    """The same workload with and without KunServe."""

    workload: Workload
    baseline: Run
    kunserve: Run
    slo: Slo

    @property
    def failed(self) -> int:
        return len(self.baseline.errors) + len(self.kunserve.errors)

    def problems(self) -> list[str]:
        """Why this is no demonstration; empty if it is one."""
        found = [f"{self.failed} requests failed"] if self.failed else []
        found += [
            f"no {kind} took place"
            for kind in ("drop", "restore")
            if not self.kunserve.committed(kind)
        ]
        if self.kunserve.restored_after_s is None:
            found.append(
                f"capacity is {self.kunserve.capacity_end:,} slots at the end, "
                f"and was {self.kunserve.capacity_before:,} before"
            )
        return found


def to_json(comparison: Comparison, setup: dict[str, Any]) -> dict[str, Any]:
    """Everything that was measured; `setup` says how the clusters were started."""
    baseline = _describe_run(comparison.baseline, comparison.slo)
    kunserve = _describe_run(comparison.kunserve, comparison.slo)
    return {
        "kunserve": kunserve,
        "baseline": baseline,
        "ratio": ratios(baseline, kunserve),
        "events": comparison.kunserve.events,
        "failed": comparison.failed,
        "machine": describe_machine(),
        "workload": {**_describe_workload(comparison.workload), **setup},
    }


def raw(comparison: Comparison) -> dict[str, Any]:
    """Every request and every sample, to draw and count in other ways."""
    runs = {"baseline": comparison.baseline, "kunserve": comparison.kunserve}
    return {
        name: {
            "requests": [_describe_result(r) for r in run.results],
            "timeline": [asdict(s) for s in run.timeline.samples],
        }
        for name, run in runs.items()
    }


def dumps(figures: dict[str, Any], indent: int | None = 1) -> str:
    """JSON that every reader takes: what could not be measured is null, as NaN is no JSON."""
    return json.dumps(_without_nan(figures), indent=indent, allow_nan=False) + "\n"


def ratios(baseline: dict[str, Any], kunserve: dict[str, Any]) -> dict[str, float]:
    """How many times better KunServe is, whichever direction is better; worse is below 1."""
    found: dict[str, float] = {}
    for key, base in baseline.items():
        if key.removesuffix("_ms") in _LOWER_IS_BETTER:
            found[key.removesuffix("_ms")] = _divide(base, kunserve[key])
        elif key in _HIGHER_IS_BETTER:
            found[key] = _divide(kunserve[key], base)
    found["capacity"] = _divide(kunserve["capacity_peak"], baseline["capacity_peak"])
    return found


def table(figures: dict[str, Any]) -> RenderableType:
    """The figures of `to_json` on one screen."""
    grid = Table(title="The same burst on the same memory", title_justify="left")
    grid.add_column("")
    for name in ("baseline", "KunServe", "times better"):
        grid.add_column(name, justify="right")
    baseline, kunserve, ratio = figures["baseline"], figures["kunserve"], figures["ratio"]
    for title, key in (("TTFT", "ttft"), ("TPOT", "tpot"), ("E2E", "e2e_latency")):
        for label, which in (("P50", "median"), ("P90", "p90"), ("P99", "p99")):
            name = f"{which}_{key}"
            values = (f"{side[f'{name}_ms']:,.0f} ms" for side in (baseline, kunserve))
            grid.add_row(f"{title} {label}", *values, f"{ratio[name]:.1f}")
        grid.add_section()
    for label, key, unit in (
        ("output throughput", "output_throughput", " tok/s"),
        ("goodput", "goodput", " req/s"),
        ("SLO attainment", "slo_attainment", ""),
    ):
        form = ".0%" if key == "slo_attainment" else ".2f" if key == "goodput" else ",.0f"
        values = (f"{side[key]:{form}}{unit}" for side in (baseline, kunserve))
        grid.add_row(label, *values, f"{ratio[key]:.1f}")
    grid.add_row(
        "KV capacity (slots)",
        *(_change(side["capacity_before"], side["capacity_peak"]) for side in (baseline, kunserve)),
        f"{ratio['capacity']:.1f}",
    )
    return Group(grid, _transitions(figures["events"]), _footer(figures))


def describe_machine() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def _transitions(events: list[dict[str, Any]]) -> RenderableType:
    grid = Table()
    grid.add_column("")
    for name in ("took", "stall", "remap", "params", "KV moved", "capacity"):
        grid.add_column(name, justify="right")
    for event in events:
        moved = _mib(event["freed_bytes"] or event["loaded_bytes"])
        grid.add_row(
            event["kind"]
            if event["status"] == "committed"
            else f"{event['kind']} {event['status']}",
            *(f"{event[f'{what}_ms']:.0f} ms" for what in ("duration", "stall", "remap")),
            moved,
            _mib(event["exchanged_bytes"]),
            _change(event["capacity_before"], event["capacity_after"]),
        )
    return grid


def _footer(figures: dict[str, Any]) -> RenderableType:
    lines = [f"{e['kind']} {e['status']}: {e['error']}" for e in figures["events"] if e["error"]]
    restored = figures["kunserve"]["restored_after_s"]
    if restored is not None:
        lines.append(f"Full replicas again {max(restored, 0):.1f} s after the last answer.")
    limits = (figures["kunserve"][f"slo_{what}_ms"] for what in ("ttft", "tpot"))
    lines.append("SLO: TTFT {:,.0f} ms and TPOT {:,.0f} ms at most.".format(*limits))
    lines.append(f"Failed requests: {figures['failed']}.")
    noise = max(figures[side]["noise"] for side in ("baseline", "kunserve"))
    if noise > _NOISY:
        lines.append(f"Other programs took up to {noise:.0%} of the cores: figures are noisy.")
    return Text("\n".join(lines))


def _describe_run(run: Run, slo: Slo) -> dict[str, Any]:
    return {
        **summarise(run.results, slo),
        "capacity_before": run.capacity_before,
        "capacity_peak": run.capacity_peak,
        "capacity_end": run.capacity_end,
        "restored_after_s": run.restored_after_s,
        "errors": run.errors,
        "noise": run.noise,
        "timeline_missed": run.timeline.missed,
    }


def _describe_result(result: RequestResult) -> dict[str, Any]:
    return {
        "sent_s": result.sent_s,
        "ttft_s": result.ttft_s,
        "tpot_s": result.tpot_s,
        "e2e_s": result.e2e_s,
        "prompt_tokens": result.prompt_len,
        "output_tokens": result.output_tokens,
        "error": result.error,
    }


def _describe_workload(workload: Workload) -> dict[str, Any]:
    burst = [
        r for r in workload.requests if workload.burst_start_s <= r.arrival_s < workload.burst_end_s
    ]
    return {
        "requests": len(workload.requests),
        "requests_in_burst": len(burst),
        "burst_start_s": workload.burst_start_s,
        "burst_end_s": workload.burst_end_s,
        "prompt_tokens": workload.prompt_tokens,
        "output_tokens": workload.output_tokens,
        "burst_tokens": sum(r.prompt_len + r.output_len for r in burst),
    }


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _divide(a: float, b: float) -> float:
    return a / b if b else float("nan")


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.0f} MiB"


def _change(before: int, after: int) -> str:
    return f"{before:,}" if before == after else f"{before:,} -> {after:,}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
