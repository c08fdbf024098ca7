"""Beside what a user would pick instead: the same loads, memory, cores and model, five ways.

`python -m benchmark.peers` starts, one after the other: KunServe, which decides by service level;
upstream SGLang, data parallel; our own groups held for good, a static pipeline; vLLM; and an
oracle, which has the memory that the burst wants from the start. All are behind the same router and
are asked by the same API. It writes `peers.json` with `rows` (one a load and way) and `checks`.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, Protocol

from rich.console import Console

from benchmark.checks import check, conclude
from benchmark.client import COMPLETIONS
from benchmark.control import control
from benchmark.demo import suit_cpu
from benchmark.display import RunDisplay
from benchmark.experiment import Run, run_workload, warm_up_requests
from benchmark.metrics import slo_from
from benchmark.program import CHUNK_FLAGS, ROOT, flags_of, run_program, small_model
from benchmark.prompts import PromptSource, load_tokenizer
from benchmark.real_regimes import LOADS, Row, figures_of, lone_requests
from benchmark.report import describe_machine, dumps
from benchmark.vllm import VLLM, VllmCluster
from benchmark.workload import Workload
from kunserve_sglang.core.sizes import parse_size
from kunserve_sglang.policy.service_level import LONE_FACTOR
from kunserve_sglang.testing.cluster import Cluster, ClusterOptions
from kunserve_sglang.testing.upstream import UpstreamCluster

UPSTREAM, STATIC, OTHER, OURS, ORACLE = "sglang", "static pipeline", "vllm", "kunserve", "oracle"
WAYS = (OURS, UPSTREAM, STATIC, OTHER, ORACLE)
"""Ours first: its instances say how many token slots the others get."""

_COMPARED = ("memory-bound, long", "prompt-heavy", "fits")
_MORE_BYTES = 1 << 30
_RESTORE_TIMEOUT_S = 60.0
_NOISE = 0.1
"""Within which two figures of one run are the same."""


class Served(Protocol):
    """Whatever has an address while its context lasts."""

    url: str


@dataclass(frozen=True, slots=True)
class Peers:
    """How each way is started; `slots` are those of one server, of `model` in `dtype`."""

    model: Path
    options: ClusterOptions
    dtype: str
    chunk: int
    logs: Path

    def started(self, way: str, slots: int) -> AbstractContextManager[Served]:
        match way:
            case "sglang":
                return UpstreamCluster(self.model, slots, self.options.sglang_flags, self.logs)
            case "vllm":
                return VllmCluster(self.model, slots, self.dtype, self.chunk, self.logs)
            case "static pipeline":
                return self._held()
            case "oracle":
                return self._cluster(way, "none", _MORE_BYTES)
        return self._cluster(way, "drop")

    def _cluster(self, way: str, policy: str, more_bytes: int = 0) -> Cluster:
        budget = str(parse_size(self.options.memory_budget) + more_bytes)
        options = replace(self.options, overload_policy=policy, memory_budget=budget)
        return Cluster(options.command, self.logs / f"peers-{way.replace(' ', '-')}.log")

    @contextmanager
    def _held(self) -> Iterator[Cluster]:
        """Parameters are shared before the first request, and stay so."""
        with self._cluster(STATIC, "none") as cluster:
            asyncio.run(_share(cluster.url))
            yield cluster


async def _share(url: str) -> None:
    async with control(url) as cluster:
        await cluster.drop()


async def _slots(url: str) -> int:
    async with control(url) as cluster:
        return await cluster.slots_of_each()


def parser() -> argparse.ArgumentParser:
    flags = flags_of("peers", "The same loads served by KunServe and by what it stands beside.")
    flags.add_argument("--model-path", type=Path, help="a model folder (default: a small one)")
    flags.add_argument("--output", type=Path, default=ROOT / "benchmark" / "results")
    flags.add_argument("--logs", type=Path, default=ROOT / "build" / "peers")
    flags.add_argument("--seed", type=int, default=1, help="of prompts and arrival times")
    flags.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, metavar="WAY")
    flags.add_argument("--loads", nargs="+", choices=_COMPARED, default=_COMPARED, metavar="LOAD")
    flags.set_defaults(memory_budget=None, sglang_flags=CHUNK_FLAGS)
    return flags


def main() -> NoReturn:
    """Exit status 0 if every check holds."""
    flags = parser().parse_args()
    run_program("peers", lambda console: run(flags, console))


def run(flags: argparse.Namespace, console: Console) -> int:
    model = flags.model_path or small_model()
    suit_cpu(flags)
    flags.logs.mkdir(parents=True, exist_ok=True)
    options = ClusterOptions(
        model_path=model,
        memory_budget=flags.memory_budget,
        overload_policy="",
        sglang_flags=tuple(flags.sglang_flags),
    )
    dtype = flags.sglang_flags[flags.sglang_flags.index("--dtype") + 1]
    peers = Peers(model, options, dtype, int(CHUNK_FLAGS[1]), flags.logs)
    loads = [load for load in LOADS if load.name in flags.loads]
    slots, slo, rows = 0, None, []
    for way in (OURS, *(way for way in flags.ways if way != OURS)):
        prompts = PromptSource(load_tokenizer(model), flags.seed)  # the same for each
        work = [lone_requests(prompts), *(load.workload(prompts, flags.seed) for load in loads)]
        with peers.started(way, slots) as cluster:
            slots = slots or asyncio.run(_slots(cluster.url))
            lone, *runs = [_serve(cluster.url, way, each, console) for each in work]
        slo = slo or slo_from(lone.results, LONE_FACTOR)
        for load, served in zip(loads, runs, strict=True):
            rows.append({"load": load.name, "way": way, **figures_of(served, slo)})
            console.print(str(rows[-1]), markup=False, soft_wrap=True)
    checks = checks_of(rows)
    results = {
        "command": "python -m benchmark.peers",
        "machine": describe_machine(),
        "model": model.name,
        "memory_budget": flags.memory_budget,
        "slots": slots,
        "sglang_flags": list(flags.sglang_flags),
        "vllm": VLLM,
        "rows": rows,
        "checks": checks,
    }
    flags.output.mkdir(parents=True, exist_ok=True)
    (flags.output / "peers.json").write_text(dumps(results))
    return conclude(checks, console)


def _serve(url: str, way: str, work: Workload, console: Console) -> Run:
    with RunDisplay(way, work, console) as display:
        return asyncio.run(
            run_workload(
                url,
                work,
                warm_up=warm_up_requests("What is a KV cache?", 4),
                restore_timeout_s=_RESTORE_TIMEOUT_S if way == OURS else 0.0,
                on_progress=display.progress,
                api=COMPLETIONS,
                flush=way != OTHER,  # which forgets nothing when it is told to
            )
        )


def checks_of(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Ours against the best of the others, the oracle apart, which has more memory."""
    found = []
    for load in LOADS:
        of_load = {r["way"]: r for r in rows if r["load"] == load.name}
        others = [r for way, r in of_load.items() if way not in (OURS, ORACLE)]
        if OURS not in of_load or not others:
            continue
        ours = of_load[OURS]

        def best(key: str, pick: Callable[..., float], rows: Sequence[Row] = others) -> float:
            return pick(row[key] for row in rows)

        slack = 0.0 if load.memory_bound else _NOISE
        attained = ours["slo_attainment"] - best("slo_attainment", max)
        first_token = ours["p99_ttft_ms"] / best("p99_ttft_ms", min)
        found += [
            check(f"{load.name}: requests that failed", ours["failed"], most=0),
            check(
                f"{load.name}: SLO attainment, ours less the best other's",
                round(attained, 3),
                least=-slack,
            ),
            check(
                f"{load.name}: P99 TTFT, ours over the best other's",
                round(first_token, 3),
                most=1 + slack,
            ),
        ]
    return found


if __name__ == "__main__":
    main()
