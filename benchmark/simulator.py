"""How well the simulator predicts real runs, and how fast it is.

`python -m benchmark.simulator --trace azure_llm_2023_conv.csv` serves a part of the trace on real
clusters, simulates the same requests with a profile of this machine, and compares percentiles of
TTFT; then it simulates a thousand instances for an hour. All clusters get the same load. Before and
after it a small one shows how fast the machine is at that time (`benchmark.pace`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmark.client import RequestResult
from benchmark.display import RunDisplay
from benchmark.experiment import Run, run_workload, warm_up_requests
from benchmark.pace import expected_tpot_ms, measured_tpot_ms, slowed, steady_load
from benchmark.program import ROOT, flags_of, run_program, small_model
from benchmark.prompts import PromptSource, load_tokenizer
from benchmark.report import describe_machine, dumps
from benchmark.simulator_picture import draw
from benchmark.traces import to_requests
from benchmark.workload import Request, Workload
from kunserve_sglang import simulation
from kunserve_sglang.core.choices import OverloadPolicy
from kunserve_sglang.core.cluster_config import ClusterConfig
from kunserve_sglang.core.messages import TransitionKind
from kunserve_sglang.simulation import Profile, SimulationResult, load_profile
from kunserve_sglang.simulation.traces import TraceRow, load_trace, multiply, scale, window
from kunserve_sglang.testing.cluster import Cluster, ClusterOptions

ERROR_BAR = 0.2
"""Largest relative error of P50 and P99 TTFT against a real run."""

HOUR_BAR_S = 600.0
_HOUR_INSTANCES = 1000
_PERCENTILES = (50, 99)


def compare(real: Sequence[RequestResult], simulated: SimulationResult) -> list[dict[str, Any]]:
    """A row a percentile of TTFT, in milliseconds; `ValueError` if nothing was answered."""
    answered = [1e3 * r.ttft_s for r in real if r.ok]
    if not answered:
        raise ValueError("no request of the real run was answered")
    predicted = [1e3 * job.ttft for job in simulated.jobs if not job.failed]
    rows = []
    for percentile in _PERCENTILES:
        measured_ms = float(np.percentile(answered, percentile))
        simulated_ms = float(np.percentile(predicted, percentile))
        rows.append(
            {
                "instances": simulated.instances,
                "policy": simulated.policy,
                "what": f"P{percentile} TTFT",
                "simulated_ms": simulated_ms,
                "measured_ms": measured_ms,
                "error": abs(simulated_ms - measured_ms) / measured_ms,
            }
        )
    return rows


def checks(rows: Sequence[dict[str, Any]], hour: dict[str, Any] | None) -> list[dict[str, Any]]:
    """What must hold: every error, and the time of the large run if it was done."""
    found = [
        {
            "name": f"{row['what']} of {row['instances']} instances, {row['policy']}: error",
            "value": row["error"],
            "bar": ERROR_BAR,
            "ok": row["error"] <= ERROR_BAR,
        }
        for row in rows
    ]
    if hour is not None:
        found.append(
            {
                "name": f"seconds to simulate {hour['instances']:,} instances for an hour",
                "value": hour["wall_s"],
                "bar": HOUR_BAR_S,
                "ok": hour["wall_s"] <= HOUR_BAR_S,
            }
        )
    return found


def serve(
    count: int,
    policy: str,
    workload: Workload,
    steady: list[Request],
    flags: argparse.Namespace,
    model: Path,
) -> tuple[Run, float]:
    """The workload on a real cluster, and its TPOT under `steady` before and after (ms)."""
    options = ClusterOptions(
        model_path=model,
        memory_budget=flags.memory_budget,
        overload_policy=policy,
        num_instances=count,
        sglang_flags=("--chunked-prefill-size", str(flags.chunked_prefill_size)),
    )
    name = f"{count}-{policy}"
    with (
        RunDisplay(name, workload, flags.console) as display,
        Cluster(
            options.command, flags.output / f"simulator-{name}.log", on_wait=display.starting
        ) as cluster,
    ):
        measured_tpot_ms(cluster.url, steady)  # warm up
        before = measured_tpot_ms(cluster.url, steady)
        display.started()
        run = asyncio.run(
            run_workload(
                cluster.url,
                workload,
                warm_up=warm_up_requests("What is a KV cache?", 2 * count),
                restore_timeout_s=60.0,
                on_progress=display.progress,
            )
        )
        return run, (before + measured_tpot_ms(cluster.url, steady)) / 2


def simulate(
    profile: Profile, count: int, policy: str, rows: Sequence[TraceRow]
) -> SimulationResult:
    config = ClusterConfig(num_instances=count, overload_policy=OverloadPolicy(policy))
    return simulation.SimulatedCluster(profile, config).run(rows)


def accuracy(flags: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of `compare` for all clusters, and what else is to be known of each run."""
    model = flags.model_path or small_model()
    profile = load_profile(flags.profile)
    prompts = PromptSource(load_tokenizer(model), flags.seed)
    trace = window(load_trace(flags.trace), flags.start, flags.duration)
    trace = scale(trace, prompt=0.1, output=0.3, max_total=700)
    trace = multiply(trace, flags.rate, seed=flags.seed)
    workload = Workload(tuple(to_requests(trace, prompts)), 0.0, 0.0)
    sent = [TraceRow(r.arrival_s, r.prompt_len, r.output_len) for r in workload.requests]
    rows: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    for count, policy in product(flags.instances, ("none", "drop")):
        steady = steady_load(prompts, count)
        real, tpot_ms = serve(count, policy, workload, steady, flags, model)
        pace = tpot_ms / expected_tpot_ms(profile, count)
        result = simulate(slowed(profile, pace), count, policy, sent)
        rows += compare(real.results, result)
        runs.append(
            {
                "instances": count,
                "policy": policy,
                "requests": len(sent),
                "failed": len(real.errors),
                "noise": real.noise,
                "pace": pace,
                "drops": len(real.committed("drop")),
                "simulated_drops": len(result.committed(TransitionKind.DROP)),
                "measured_ttft_s": [r.ttft_s for r in real.results if r.ok],
                "simulated_ttft_s": [j.ttft for j in result.jobs if not j.failed],
            }
        )
    return rows, runs


def large(flags: argparse.Namespace) -> dict[str, Any]:
    """A thousand instances for an hour of the trace, on one core."""
    profile = load_profile(flags.large_profile)
    rows = window(load_trace(flags.trace), 0.0, 3600.0)
    rows = multiply(rows, flags.large_rate, seed=flags.seed)
    config = ClusterConfig(num_instances=_HOUR_INSTANCES)
    with Progress(console=flags.console) as bars:
        task = bars.add_task(f"{_HOUR_INSTANCES:,} instances", total=len(rows))
        result = simulation.SimulatedCluster(profile, config).run(
            rows, lambda finished, _: bars.update(task, completed=finished)
        )
    ttft = [job.ttft for job in result.jobs if not job.failed]
    return {
        "instances": _HOUR_INSTANCES,
        "requests": len(result.jobs),
        "wall_s": result.wall_s,
        "cpu_s": result.cpu_s,
        "p50_ttft_s": float(np.percentile(ttft, 50)),
        "p99_ttft_s": float(np.percentile(ttft, 99)),
        "drops": len(result.committed(TransitionKind.DROP)),
        "cooperative_instance_s": result.cooperative_s,
        "profile": profile.name,
    }


def table(found: Sequence[dict[str, Any]]) -> Table:
    grid = Table(title="The simulator", title_justify="left")
    for name in ("", "value", "bar", ""):
        grid.add_column(name, justify="right" if name else "left")
    for check in found:
        verdict = "ok" if check["ok"] else "missed"
        grid.add_row(check["name"], f"{check['value']:.3g}", f"{check['bar']:.3g}", verdict)
    return grid


def parser() -> argparse.ArgumentParser:
    flags = flags_of("simulator", "The simulator against real runs, and its speed.")
    traces = ROOT.parent / "shared" / "traces"
    flags.add_argument("--trace", type=Path, default=traces / "azure_llm_2023_conv.csv")
    flags.add_argument("--profile", type=Path, default="smollm2-135m-cpu")
    flags.add_argument("--model-path", type=Path, help="a model folder (default: a small one)")
    flags.add_argument("--memory-budget", default="288MiB", help="as in the profile")
    flags.add_argument("--chunked-prefill-size", type=int, default=256, help="as in the profile")
    flags.add_argument("--instances", type=_counts, default=(2, 4), help="of the real clusters")
    flags.add_argument("--start", type=float, default=0.0, help="seconds into the trace")
    flags.add_argument("--duration", type=float, default=90.0, help="seconds of the trace")
    flags.add_argument("--rate", type=float, default=0.2, help="share of the trace's requests")
    flags.add_argument("--seed", type=int, default=1)
    flags.add_argument("--large-profile", type=Path, default="qwen2.5-14b-a800")
    flags.add_argument("--large-rate", type=float, default=180.0, help="times the trace")
    flags.add_argument("--only", choices=("accuracy", "hour"), help="leave the other as it is")
    flags.add_argument("--output", type=Path, default=ROOT / "benchmark" / "results")
    return flags


def main() -> NoReturn:
    """Exit status 0 if every check holds."""
    flags = parser().parse_args()
    run_program("simulator", lambda console: run(flags, console))


def run(flags: argparse.Namespace, console: Console) -> int:
    flags.console = console
    flags.output.mkdir(parents=True, exist_ok=True)
    path = flags.output / "simulator.json"
    figures: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if flags.only != "hour":
        rows, runs = accuracy(flags)
        figures["rows"] = rows
        figures["runs"] = [{k: v for k, v in run.items() if not k.endswith("_s")} for run in runs]
        draw(runs, flags.output / "simulator.png")
    if flags.only != "accuracy":
        figures["large"] = large(flags)
    found = checks(figures.get("rows", ()), figures.get("large"))
    figures |= {
        "checks": found,
        "setup": {
            **{name: getattr(flags, name) for name in ("start", "duration", "rate", "seed")},
            "trace": flags.trace.name,
            "profile": flags.profile.name,
            "memory_budget": flags.memory_budget,
        },
        "machine": describe_machine(),
    }
    path.write_text(dumps(figures))
    flags.console.print(table(found))
    flags.console.print(f"Written: simulator.json and simulator.png in {flags.output}")
    return 0 if all(check["ok"] for check in found) else 1


def _counts(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    main()
