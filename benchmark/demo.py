"""A burst on two instances, first as any cluster serves it, then with KunServe.

`python -m benchmark.demo` starts each cluster in turn with the same memory budget, cores and
SGLang flags, sends the same requests at the same times, and writes a table, JSON and a picture.
When all is as it was before, a second, shorter burst follows, in which memory is not what is short.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import aiohttp
import torch
from rich.console import Console

from benchmark import second_burst
from benchmark.display import RunDisplay
from benchmark.experiment import Run, RunError, run_workload, warm_up_requests
from benchmark.metrics import Slo, slo_from
from benchmark.picture import draw
from benchmark.program import CHUNK_FLAGS, ROOT, flags_of, run_program, small_model
from benchmark.prompts import PromptSource, load_tokenizer
from benchmark.report import Comparison, dumps, raw, table, to_json
from benchmark.timeline import StatusReader
from benchmark.workload import Shape, Workload, steady_and_burst
from kunserve_sglang.execution.dtypes import FLOAT32, choose_dtype
from kunserve_sglang.sglang_seam.cpu_dtype import times_slower
from kunserve_sglang.testing.cluster import Cluster, ClusterOptions

_RESTORE_TIMEOUT_S = 60.0

_BUDGETS = {"bfloat16": "288MiB", FLOAT32: "576MiB"}
"""Parameters of the default model, and some 1,300 slots of KV."""

_LAYER = (576, 1536)
"""Of the default model."""


def parser() -> argparse.ArgumentParser:
    """The defaults are a burst that overflows the two KV pools, and fits them after a drop."""
    flags = flags_of("demo", "The same burst without and with KunServe, on this machine.")
    flags.add_argument("--model-path", type=Path, help="a model folder (default: a small one)")
    flags.add_argument(
        "--memory-budget",
        help=f"parameters + KV an instance (default: {' or '.join(_BUDGETS.values())}, by dtype)",
    )
    flags.add_argument("--output", type=Path, default=ROOT / "benchmark" / "results")
    flags.add_argument("--scale", type=float, default=1.0, help="size of the burst")
    flags.add_argument("--seed", type=int, default=1, help="of prompts and arrival times")
    flags.add_argument(
        "--slo-scale",
        type=float,
        default=5.0,
        help="SLO: how many times the median latency that requests had before the burst",
    )
    flags.set_defaults(sglang_flags=CHUNK_FLAGS)
    return flags


def build_workload(prompts: PromptSource, scale: float, seed: int) -> Workload:
    """One or two requests in flight at any time, and a burst that needs some 5,000 slots."""
    return steady_and_burst(
        prompts,
        steady_rate=0.3,
        steady=Shape(prompt_len=96, output_len=64),
        burst_requests=round(18 * scale),
        burst=Shape(prompt_len=96, output_len=192),
        before_s=15.0,
        burst_s=8.0,
        after_s=40.0,
        seed=seed,
    )


def main() -> NoReturn:
    """Exit status 0 if every request was answered and a drop and a restore took place."""
    flags = parser().parse_args()
    run_program("demo", lambda console: run(flags, console))


def run(flags: argparse.Namespace, console: Console) -> int:
    """Both runs and their results; returns the exit status."""
    model = flags.model_path or small_model()
    prompts = PromptSource(load_tokenizer(model), flags.seed)
    workload = build_workload(prompts, flags.scale, flags.seed)
    second = second_burst.workload(prompts, flags.scale, flags.seed)
    suit_cpu(flags)
    console.print(
        f"{len(workload.requests)} requests in {workload.duration_s:.0f} s, a burst from "
        f"{workload.burst_start_s:.0f} to {workload.burst_end_s:.0f} s; two instances of "
        f"{flags.memory_budget} on {model.name}"
    )
    options = ClusterOptions(
        model_path=model,
        memory_budget=flags.memory_budget,
        overload_policy="none",
        sglang_flags=flags.sglang_flags,
    )
    loads = (workload, second)
    baseline = _run_one("baseline", options, loads, flags.output, console)
    options = replace(options, overload_policy="drop")
    kunserve = _run_one("KunServe", options, loads, flags.output, console)
    first = baseline.runs[0], kunserve.runs[0]
    slo = _slo(first, workload, flags.slo_scale)
    bursts = second_burst.to_json(first, (baseline.runs[1], kunserve.runs[1]), kunserve.limits)
    comparison = Comparison(workload, *first, slo)
    return _publish(comparison, bursts, flags, model, console)


def suit_cpu(flags: argparse.Namespace) -> None:
    """Unless a budget was named: one for the data type that this CPU is fast in, and that type.

    As the launcher does by itself, which could not have known for which budget.
    """
    if flags.memory_budget:
        return
    slower = times_slower(torch.bfloat16, *_LAYER)
    choice = choose_dtype("bfloat16", slower, own_bytes=0, budget=1)
    flags.memory_budget = _BUDGETS[choice.dtype]
    flags.sglang_flags = (*CHUNK_FLAGS, "--dtype", choice.dtype)


@dataclass(frozen=True, slots=True)
class Served:
    """One cluster's runs, in order, and the limits that it promises to keep."""

    runs: list[Run]
    limits: Slo


def _run_one(
    name: str,
    options: ClusterOptions,
    loads: Sequence[Workload],
    output: Path,
    console: Console,
) -> Served:
    log = output / f"{name.lower()}.log"
    display = RunDisplay(name, loads[0], console)
    with ExitStack() as shown:
        shown.enter_context(display)
        with Cluster(options.command, log, on_wait=display.starting) as cluster:
            try:
                runs = [_serve(cluster.url, loads[0], options, display)]
                shown.close()
                for load in loads[1:]:
                    with RunDisplay("then", load, console) as display:
                        runs.append(_serve(cluster.url, load, options, display))
                return Served(runs, asyncio.run(_limits(cluster.url)))
            except (aiohttp.ClientError, OSError):
                cluster.check_running()  # its log says more than a lost connection
                raise


def _serve(url: str, load: Workload, options: ClusterOptions, display: RunDisplay) -> Run:
    display.started()
    running = run_workload(
        url,
        load,
        warm_up=warm_up_requests("What is a KV cache?", 2 * options.num_instances),
        restore_timeout_s=_RESTORE_TIMEOUT_S,
        on_progress=display.progress,
    )
    return asyncio.run(running)


async def _limits(url: str) -> Slo:
    async with aiohttp.ClientSession() as session:
        return second_burst.promised(await StatusReader(url, session).status())


def _slo(runs: tuple[Run, ...], workload: Workload, scale: float) -> Slo:
    calm = [r for run in runs for r in run.results if r.sent_s < workload.burst_start_s]
    if not any(r.ok for r in calm):
        raise RunError(f"no request before the burst succeeded: {runs[0].errors[:1]}")
    return slo_from(calm, scale)


def _publish(
    comparison: Comparison,
    bursts: dict[str, dict[str, Any]],
    flags: argparse.Namespace,
    model: Path,
    console: Console,
) -> int:
    setup: dict[str, Any] = {
        "model": model.name,
        "memory_budget": flags.memory_budget,
        "sglang_flags": list(flags.sglang_flags),
        "seed": flags.seed,
        "scale": flags.scale,
    }
    figures = to_json(comparison, setup) | {"bursts": bursts}
    (flags.output / "demo.json").write_text(dumps(figures))
    (flags.output / "demo-raw.json").write_text(dumps(raw(comparison), indent=None))
    draw(comparison, flags.output / "demo.png")
    console.print(table(figures))
    console.print(second_burst.table(bursts))
    console.print(f"Written: demo.json, demo-raw.json and demo.png in {flags.output}")
    problems = comparison.problems()
    if second_burst.is_worse(bursts):
        problems.append("fewer requests of the second burst kept their limits than without")
    for problem in problems:
        console.print(f"demo: {problem}", style="red")
    return 1 if problems else 0


if __name__ == "__main__":
    main()
