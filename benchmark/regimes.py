"""Never worse than without: what the controller decides where memory is short, and where it is not.

`python -m benchmark.regimes` simulates loads of different kinds on a CPU and on a GPU, each without
dropping, with dropping whenever memory is short, and by service level, and writes `regimes.json`
with `rows` (one a run) and `checks`. It starts nothing and needs no model.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import numpy as np
from rich.console import Console

from benchmark.checks import check, conclude
from benchmark.program import ROOT, flags_of, run_program
from kunserve_sglang.core.choices import OverloadPolicy
from kunserve_sglang.core.cluster_config import ClusterConfig
from kunserve_sglang.core.messages import TransitionKind
from kunserve_sglang.policy.service_level import UNNAMED, ServiceLevel, times_of
from kunserve_sglang.simulation import Profile, SimulatedCluster, load_profile
from kunserve_sglang.simulation.job import Job
from kunserve_sglang.simulation.result import SimulationResult
from kunserve_sglang.simulation.traces import TraceRow

POLICIES = (OverloadPolicy.NONE, OverloadPolicy.DROP_ALWAYS, OverloadPolicy.DROP)
SEEDS = (1, 2, 3)
INSTANCES = 2

MOST_LOST = 0.02
MOST_E2E = 1.05
LEAST_TTFT = 10.0

_SLOW_PRODUCTS = 8.0
"""Times as long for products of matrices: bf16 on a CPU that has no instructions for it."""

PATIENT = ServiceLevel(ttft_ms=120_000.0, tpot_ms=5_000.0)
"""What those ask for who do something else meanwhile."""

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Regime:
    """Requests for two instances: some all the time, and `peak_per_s` more for a while.

    With `ramp`, these come ever faster until then. Lengths are means; each differs by up to 30 %.
    A share of them is `patient`: nobody waits for their tokens.
    """

    name: str
    profile: str
    budget: str
    prompt: int
    output: int
    steady_per_s: float
    peak_per_s: float
    peak_s: float = 30.0
    before_s: float = 20.0
    after_s: float = 40.0
    ramp: bool = False
    memory_bound: bool = False
    patient: float = 0.0

    def requests(self, seed: int) -> list[TraceRow]:
        chance = random.Random(seed)
        end = self.before_s + self.peak_s + self.after_s
        times = list(_poisson(chance, self.steady_per_s, 0.0, end))
        for at in _poisson(chance, self.peak_per_s, self.before_s, self.before_s + self.peak_s):
            share = (at - self.before_s) / self.peak_s
            if not self.ramp or chance.random() < share:
                times.append(at)
        return [
            TraceRow(
                at,
                _length(chance, self.prompt),
                _length(chance, self.output),
                level=PATIENT if self.patient and chance.random() < self.patient else UNNAMED,
            )
            for at in sorted(times)
        ]


def _poisson(chance: random.Random, rate: float, start: float, end: float) -> Iterator[float]:
    at = start + chance.expovariate(rate)
    while at < end:
        yield at
        at += chance.expovariate(rate)


def _length(chance: random.Random, mean: int) -> int:
    return max(4, round(mean * chance.uniform(0.7, 1.3)))


REGIMES = (
    Regime("fits", "cpu", "288MiB", 64, 64, 0.3, 0.3),
    Regime("memory-bound, short", "cpu", "276MiB", 24, 96, 0.3, 2.5, 60, memory_bound=True),
    Regime("memory-bound, long", "cpu", "288MiB", 32, 256, 0.1, 1.3, 60, memory_bound=True),
    Regime("compute-bound", "slow cpu", "320MiB", 96, 192, 0.1, 1.0, 30),
    Regime("prompt-heavy", "cpu", "288MiB", 400, 24, 0.1, 1.5, 30),
    Regime("slow ramp", "cpu", "276MiB", 32, 128, 0.3, 2.0, 90, ramp=True),
    Regime("two classes", "cpu", "288MiB", 64, 128, 0.2, 2.0, 60, patient=0.7),
    Regime("fits", "gpu", "36GiB", 500, 200, 1, 1),
    Regime("memory-bound, short", "gpu", "30GiB", 200, 200, 0.5, 12, 60, memory_bound=True),
    Regime("memory-bound, long", "gpu", "32GiB", 200, 800, 0.2, 5, 60, memory_bound=True),
    Regime("compute-bound", "gpu", "67GiB", 500, 400, 1, 30, 30),
    Regime("prompt-heavy", "gpu", "36GiB", 6000, 60, 0.2, 1.6, 30),
    Regime("slow ramp", "gpu", "32GiB", 200, 400, 0.5, 12, 90, ramp=True),
    Regime("two classes", "gpu", "32GiB", 200, 400, 0.5, 12, 60, patient=0.7),
)


def machines() -> dict[str, Profile]:
    """The profiles by name; the slow CPU is the other one, but for products of matrices."""
    cpu = load_profile(Path("smollm2-135m-cpu"))
    gpu = load_profile(Path("qwen2.5-14b-a800"))
    batch, each, beta, *rest = cpu.cost.prefill
    step, request, token = cpu.cost.decode
    slow = msgspec.structs.replace(
        cpu.cost,
        prefill=(batch, each, _SLOW_PRODUCTS * beta, *rest),
        decode=(step, _SLOW_PRODUCTS * request, token),
    )
    return {"cpu": cpu, "slow cpu": msgspec.structs.replace(cpu, cost=slow), "gpu": gpu}


def run_one(regime: Regime, profile: Profile, policy: OverloadPolicy) -> Row:
    """All seeds of one regime under one policy, as one row."""
    profile = msgspec.structs.replace(profile, memory_budget=regime.budget)
    config = ClusterConfig(num_instances=INSTANCES, overload_policy=policy)
    results = [SimulatedCluster(profile, config).run(regime.requests(seed)) for seed in SEEDS]
    jobs = [job for result in results for job in result.jobs]
    done = [job for job in jobs if not job.failed]
    ttft = np.array([1e3 * job.ttft for job in done])
    tpot = np.array([1e3 * job.tpot for job in done if job.output > 1])
    e2e = np.array([1e3 * (job.end - job.arrival) for job in done])
    return {
        "regime": regime.name,
        "profile": regime.profile,
        "memory_budget": regime.budget,
        "policy": policy.value,
        "requests": len(jobs),
        "slo_attainment": statistics.mean(_kept(job, profile) for job in jobs),
        "median_ttft_ms": float(np.median(ttft)),
        "p99_ttft_ms": float(np.percentile(ttft, 99)),
        "median_tpot_ms": float(np.median(tpot)),
        "median_e2e_ms": float(np.median(e2e)),
        "output_throughput": sum(job.output for job in done) / sum(r.duration_s for r in results),
        "drops": _count(results, "drop", "committed"),
        "declined": _count(results, "drop", "declined"),
        "restores": _count(results, "restore", "committed"),
        "why": _first_drop(results),
    }


def _kept(job: Job, profile: Profile) -> bool:
    """Whether a request has had what it asks for, or else five times as long as alone."""
    times = times_of([profile.cost], profile.layers)
    limits = job.level.limits(times, job.prompt, job.output)
    return not job.failed and 1e3 * job.ttft <= limits.ttft_ms and 1e3 * job.tpot <= limits.tpot_ms


def _count(results: Sequence[SimulationResult], kind: str, status: str) -> int:
    return sum(e.kind == kind and e.status == status for r in results for e in r.events)


def _first_drop(results: Sequence[SimulationResult]) -> str:
    """Why the first drop was done, or declined."""
    events = (e for r in results for e in r.events if e.kind is TransitionKind.DROP)
    return next((e.error or e.reason for e in events), "")


def checks_of(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Of each regime on each machine, that it is never worse than the better of the other ways."""
    by_run = {(r["profile"], r["regime"], r["policy"]): r for r in rows}
    found = []
    for regime in REGIMES:
        runs = [by_run.get((regime.profile, regime.name, p.value)) for p in POLICIES]
        if None in runs:
            continue
        found += never_worse(
            f"{regime.profile}, {regime.name}",
            [run for run in runs if run is not None],
            LEAST_TTFT if regime.memory_bound else None,
        )
    return found


def never_worse(where: str, ways: Sequence[Row], least_ttft: float | None) -> list[dict[str, Any]]:
    """Of one load served in each way of `POLICIES`; with a `least_ttft`, where memory is short."""
    never, always, chosen = ways
    best = max(never["slo_attainment"], always["slo_attainment"])
    lost = best - chosen["slo_attainment"]
    slower = chosen["median_e2e_ms"] / never["median_e2e_ms"]
    found = [
        check(f"{where}: SLO attainment lost", lost, most=MOST_LOST),
        check(f"{where}: median E2E of never dropping", slower, most=MOST_E2E),
    ]
    if least_ttft is not None:
        better = never["p99_ttft_ms"] / chosen["p99_ttft_ms"]
        found.append(check(f"{where}: P99 TTFT better", better, least=least_ttft))
    return found


def parser() -> argparse.ArgumentParser:
    flags = flags_of("regimes", "What is decided where memory is short, and where it is not.")
    flags.add_argument("--output", type=Path, default=ROOT / "benchmark" / "results")
    return flags


def main() -> NoReturn:
    """Exit status 0 if every check holds."""
    flags = parser().parse_args()
    run_program("regimes", lambda console: run(flags, console))


def run(flags: argparse.Namespace, console: Console) -> int:
    profiles = machines()
    rows = []
    for regime in REGIMES:
        for policy in POLICIES:
            row = run_one(regime, profiles[regime.profile], policy)
            rows.append(row)
            console.print(line_of(row), markup=False, soft_wrap=True)
    checks = checks_of(rows)
    results = {
        "command": "python -m benchmark.regimes",
        "instances": INSTANCES,
        "seeds": SEEDS,
        "rows": rows,
        "checks": checks,
    }
    flags.output.mkdir(parents=True, exist_ok=True)
    (flags.output / "regimes.json").write_text(json.dumps(results, indent=1) + "\n")
    return conclude(checks, console)


def line_of(row: Row) -> str:
    """A row for people."""
    return (
        f"{row['profile']}, {row['regime']}, {row['policy']}: {row['slo_attainment']:.1%} within "
        f"their limits, P99 TTFT {row['p99_ttft_ms']:,.0f} ms, median TPOT "
        f"{row['median_tpot_ms']:,.0f} ms, median E2E {row['median_e2e_ms']:,.0f} ms, "
        f"{row['drops']} drops, {row['declined']} declined"
    )


if __name__ == "__main__":
    main()
