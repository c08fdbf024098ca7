"""Never worse than without, on this machine: loads of several kinds, each served in three ways.

`python -m benchmark.real_regimes` starts two instances three times: without dropping, with dropping
whenever memory is short, and by service level. Each serves the same loads, one after the other. It
writes `real_regimes.json` with `rows` (one a load and way) and `checks`, which are those of
`benchmark.regimes`, where the same is simulated.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from benchmark.checks import conclude
from benchmark.demo import suit_cpu
from benchmark.display import RunDisplay
from benchmark.experiment import Run, run_workload, warm_up_requests
from benchmark.metrics import Slo, slo_from, summarise
from benchmark.program import CHUNK_FLAGS, ROOT, flags_of, run_program, small_model
from benchmark.prompts import PromptSource, load_tokenizer
from benchmark.regimes import POLICIES, line_of, never_worse
from benchmark.report import describe_machine
from benchmark.workload import Request, Shape, Workload
from kunserve_sglang.policy.service_level import LONE_FACTOR, USUAL_TOKENS
from kunserve_sglang.testing.cluster import Cluster, ClusterOptions

LEAST_TTFT = 20.0

_LONE = 5
"""Requests that are served alone, to see how long one takes."""

_LONE_EVERY_S = 4.0
_CALM_S = 10.0
"""Before the burst, with a request every few seconds, and after it."""

_CALM_EVERY_S = 3.0
_RESTORE_TIMEOUT_S = 60.0

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Load:
    """Requests of one shape: a few all the time, and `burst` more within `burst_s` seconds.

    With `ramp`, these come ever faster.
    """

    name: str
    shape: Shape
    burst: int
    burst_s: float = 8.0
    ramp: bool = False
    memory_bound: bool = False

    def workload(self, prompts: PromptSource, seed: int) -> Workload:
        chance = random.Random(seed)
        end = _CALM_S + self.burst_s
        times = [*_every(_CALM_EVERY_S, end + _CALM_S)]
        for _ in range(self.burst):
            at = chance.random() ** 0.5 if self.ramp else chance.random()
            times.append(_CALM_S + at * self.burst_s)
        return Workload(
            tuple(_request(prompts, at, self.shape) for at in sorted(times)),
            burst_start_s=_CALM_S,
            burst_end_s=end,
        )


LOADS = (
    Load("fits", Shape(96, 64), burst=4),
    Load("memory-bound, short", Shape(64, 128), burst=30, memory_bound=True),
    Load("memory-bound, long", Shape(96, 256), burst=18, memory_bound=True),
    Load("prompt-heavy", Shape(400, 16), burst=20),
    Load("slow ramp", Shape(96, 96), burst=30, burst_s=20.0, ramp=True),
)


def _every(interval_s: float, until_s: float) -> Iterator[float]:
    return (i * interval_s for i in range(int(until_s / interval_s)))


def _request(prompts: PromptSource, at: float, shape: Shape) -> Request:
    text, length = prompts.text(shape.prompt_len)
    return Request(at, text, length, shape.output_len)


def lone_requests(prompts: PromptSource) -> Workload:
    """Each alone, and of the length that limits are promised for at least."""
    shape = Shape(USUAL_TOKENS, 32)
    times = _every(_LONE_EVERY_S, _LONE * _LONE_EVERY_S)
    return Workload(tuple(_request(prompts, at, shape) for at in times), 0.0, 0.0)


def parser() -> argparse.ArgumentParser:
    flags = flags_of("real_regimes", "Loads of several kinds on two instances, served in 3 ways.")
    flags.add_argument("--model-path", type=Path, help="a model folder (default: a small one)")
    flags.add_argument("--output", type=Path, default=ROOT / "benchmark" / "results")
    flags.add_argument("--seed", type=int, default=1, help="of prompts and arrival times")
    flags.add_argument(
        "--loads",
        nargs="+",
        choices=[load.name for load in LOADS],
        default=[load.name for load in LOADS],
        metavar="LOAD",
    )
    flags.set_defaults(memory_budget=None, sglang_flags=CHUNK_FLAGS)
    return flags


def main() -> NoReturn:
    """Exit status 0 if every check holds."""
    flags = parser().parse_args()
    run_program("real_regimes", lambda console: run(flags, console))


def run(flags: argparse.Namespace, console: Console) -> int:
    model = flags.model_path or small_model()
    suit_cpu(flags)
    options = ClusterOptions(
        model_path=model,
        memory_budget=flags.memory_budget,
        overload_policy="",
        sglang_flags=flags.sglang_flags,
    )
    loads = [load for load in LOADS if load.name in flags.loads]
    tokenizer = load_tokenizer(model)
    slo: Slo | None = None
    rows: list[Row] = []
    for policy in POLICIES:
        # The same prompts for each; a cluster has cached none of them.
        prompts = PromptSource(tokenizer, flags.seed)
        workloads = [lone_requests(prompts), *(ld.workload(prompts, flags.seed) for ld in loads)]
        with Cluster(
            replace(options, overload_policy=policy.value).command,
            flags.output / f"real_regimes-{policy.value}.log",
        ) as cluster:
            lone, *runs = (_serve(cluster, work, policy.value, console) for work in workloads)
        slo = slo or slo_from(lone.run.results, LONE_FACTOR)
        for load, served in zip(loads, runs, strict=True):
            rows.append(_row(load, policy.value, served, slo))
            console.print(line_of(rows[-1]), markup=False, soft_wrap=True)
    checks = checks_of(rows)
    results = {
        "command": "python -m benchmark.real_regimes",
        "machine": describe_machine(),
        "model": model.name,
        "memory_budget": flags.memory_budget,
        "sglang_flags": list(flags.sglang_flags),
        "rows": rows,
        "checks": checks,
    }
    flags.output.mkdir(parents=True, exist_ok=True)
    (flags.output / "real_regimes.json").write_text(json.dumps(results, indent=1) + "\n")
    return conclude(checks, console)


@dataclass(slots=True)
class Served:
    """What became of one load, and the transitions that were made meanwhile or declined."""

    run: Run
    events: list[dict[str, Any]]

    def count(self, kind: str, status: str) -> int:
        return sum(e["kind"] == kind and e["status"] == status for e in self.events)

    def why(self) -> str:
        """Of the first drop: why it was done, or declined."""
        drops = [e for e in self.events if e["kind"] == "drop"]
        return (drops[-1].get("error") or drops[-1]["reason"]) if drops else ""


def _serve(cluster: Cluster, work: Workload, name: str, console: Console) -> Served:
    began = time.time()
    with RunDisplay(name, work, console) as display:
        running = run_workload(
            cluster.url,
            work,
            warm_up=warm_up_requests("What is a KV cache?", 4),
            restore_timeout_s=_RESTORE_TIMEOUT_S,
            on_progress=display.progress,
        )
        done = asyncio.run(running)
    return Served(done, [e for e in done.events if e["time"] >= began])


def figures_of(served: Run, slo: Slo) -> Row:
    """What a row of any comparison of real loads has."""
    figures = summarise(served.results, slo)
    wanted = ("median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "slo_ttft_ms", "slo_tpot_ms")
    return {
        "requests": len(served.results),
        "failed": figures["failed"],
        "slo_attainment": figures["slo_attainment"],
        **{key: round(figures[key], 1) for key in wanted},
        "median_e2e_ms": round(figures["median_e2e_latency_ms"], 1),
        "output_throughput": round(figures["output_throughput"], 1),
        "noise": round(served.noise, 3),
    }


def _row(load: Load, policy: str, served: Served, slo: Slo) -> Row:
    return {
        "regime": load.name,
        "profile": "here",
        "policy": policy,
        **figures_of(served.run, slo),
        "drops": served.count("drop", "committed"),
        "declined": served.count("drop", "declined"),
        "restores": served.count("restore", "committed"),
        "why": served.why(),
    }


def checks_of(rows: Sequence[Row]) -> list[dict[str, Any]]:
    by_run = {(row["regime"], row["policy"]): row for row in rows}
    found = []
    for load in LOADS:
        if (load.name, POLICIES[0].value) not in by_run:
            continue
        ways = [by_run[load.name, policy.value] for policy in POLICIES]
        least = LEAST_TTFT if load.memory_bound else None
        found += never_worse(load.name, ways, least)
    return found


if __name__ == "__main__":
    main()
