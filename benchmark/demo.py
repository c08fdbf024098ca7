"""A burst on two instances, first as any cluster serves it, then with KunServe.

`python -m benchmark.demo` starts each cluster in turn with the same memory budget, cores and
SGLang flags, sends the same requests at the same times, and writes a table, JSON and a picture. How
many requests they are, and when they come, depends on how fast the first cluster turns out to be.
When all is as it was before, a second, shorter burst follows, in which memory is not what is short.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
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
from benchmark.sizing import PROMPT_LEN, Sizes, measure, sized
from benchmark.timeline import StatusReader
from benchmark.workload import Shape, Workload, steady_and_burst
from kunserve_sglang.execution.dtypes import FLOAT32, choose_dtype
from kunserve_sglang.sglang_seam.cpu_dtype import times_slower
from kunserve_sglang.testing.cluster import Cluster, ClusterOptions

_INSTANCES = 2
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


def build_workload(prompts: PromptSource, sizes: Sizes, seed: int) -> Workload:
    """One or two requests in flight at any time, and a burst that overflows the pools."""
    return steady_and_burst(
        prompts,
        steady_rate=sizes.steady_rate,
        steady=Shape(PROMPT_LEN, sizes.output_len // 3),
        burst_requests=sizes.requests,
        burst=Shape(PROMPT_LEN, sizes.output_len),
        before_s=sizes.before_s,
        burst_s=sizes.burst_s,
        after_s=sizes.after_s,
        seed=seed,
    )


def main() -> NoReturn:
    """Exit status 0 if every request was answered and a drop and a restore took place."""
    flags = parser().parse_args()
    run_program("demo", lambda console: run(flags, console))


def run(flags: argparse.Namespace, console: Console) -> int:
    """Both runs and their results; returns the exit status."""
    model = flags.model_path or small_model()
    suit_cpu(flags)
    options = ClusterOptions(
        model_path=model,
        memory_budget=flags.memory_budget,
        num_instances=_INSTANCES,
        overload_policy="none",
        sglang_flags=flags.sglang_flags,
    )
    console.print(f"Two instances of {flags.memory_budget} on {model.name}")
    with _started("baseline", options, flags.output, console) as cluster:
        plan = _plan(cluster.url, model, flags)
        console.print(f"{plan}", soft_wrap=True)
        baseline = _serve_all("baseline", cluster, plan, console)
    options = replace(options, overload_policy="drop")
    with _started("KunServe", options, flags.output, console) as cluster:
        kunserve = _serve_all("KunServe", cluster, plan, console)
    first = baseline.runs[0], kunserve.runs[0]
    slo = _slo(first, plan.loads[0], flags.slo_scale)
    bursts = second_burst.to_json(first, (baseline.runs[1], kunserve.runs[1]), kunserve.limits)
    comparison = Comparison(plan.loads[0], *first, slo)
    return _publish(comparison, bursts, plan.sizes, flags, model, console)


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
class Plan:
    """Both loads, and what they were sized by."""

    sizes: Sizes
    loads: tuple[Workload, Workload]

    def __str__(self) -> str:
        first = self.loads[0]
        return (
            f"{len(first.requests)} requests in {first.duration_s:.0f} s, a burst from "
            f"{first.burst_start_s:.0f} to {first.burst_end_s:.0f} s; {self.sizes}"
        )


def _plan(url: str, model: Path, flags: argparse.Namespace) -> Plan:
    prompts = PromptSource(load_tokenizer(model), flags.seed)
    sizes = sized(asyncio.run(measure(url, prompts, _INSTANCES)), flags.scale)
    second = second_burst.workload(prompts, sizes, flags.seed)
    return Plan(sizes, (build_workload(prompts, sizes, flags.seed), second))


@contextmanager
def _started(
    name: str, options: ClusterOptions, output: Path, console: Console
) -> Iterator[Cluster]:
    log = output / f"{name.lower()}.log"
    with ExitStack() as stack:
        with console.status(name) as status:

            def waiting(waited_s: float) -> None:
                status.update(f"{name}: starting the cluster ({waited_s:.0f} s)")

            cluster = stack.enter_context(Cluster(options.command, log, on_wait=waiting))
        try:
            yield cluster
        except (aiohttp.ClientError, OSError):
            cluster.check_running()  # its log says more than a lost connection
            raise


@dataclass(frozen=True, slots=True)
class Served:
    """One cluster's runs, in order, and the limits that it promises to keep."""

    runs: list[Run]
    limits: Slo


def _serve_all(name: str, cluster: Cluster, plan: Plan, console: Console) -> Served:
    runs = []
    for label, load in zip((name, "then"), plan.loads, strict=True):
        with RunDisplay(label, load, console) as display:
            runs.append(_serve(cluster.url, load, display))
    return Served(runs, asyncio.run(_limits(cluster.url)))


def _serve(url: str, load: Workload, display: RunDisplay) -> Run:
    display.started()
    running = run_workload(
        url,
        load,
        warm_up=warm_up_requests("What is a KV cache?", 2 * _INSTANCES),
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
    sizes: Sizes,
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
        "sizes": asdict(sizes),
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
