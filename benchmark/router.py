"""The router alone, beside SGLang's own in Rust: what it adds to TTFT, and what a core carries.

`python -m benchmark.router` needs no model: mock instances answer at once. Both routers are up all
the time, on the same core that nothing else of the benchmark uses, and are loaded in turns with the
instances themselves. It writes `router.json` with `rows` (medians of the rounds) and `checks` (each
with its bar).
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import uvloop
from rich.console import Console

from benchmark.checks import check, conclude
from benchmark.experiment import RunError
from benchmark.noise import Noise
from benchmark.program import ROOT, flags_of, run_program
from benchmark.report import describe_machine
from benchmark.router_load import BurstClient, Client, MockInstance, StreamClient, Tally
from benchmark.routers import UPSTREAM, Router, UpstreamRouter, install_upstream
from kunserve_sglang.core.processes import divide_cpus

INSTANCES = 4
STEP_S = 0.02
"""A decode step of the mock instances: the time between the chunks of a stream."""

_WARM_UP_S = 0.3
_ENDLESS = 500_000
_MEAN_CHUNKS = 20
_SHARE = 0.7
"""Of what SGLang's router, which is compiled, does on one core."""

DIRECT, OURS, THEIRS = "direct", "kunserve", "sglang-router"
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Case:
    """A kind of load: `streams` clients at once."""

    what: str
    streams: int


CASES = (
    *(Case("ttft", streams) for streams in (1, 32, 256)),
    Case("burst", 32),
    Case("chunks", 32),
    Case("requests", 32),
)


@dataclass(frozen=True, slots=True)
class Target:
    """Where clients connect to, and the router whose CPU time counts; direct has none."""

    name: str
    ports: Sequence[int]
    router: Router | None = None

    def cpu_s(self) -> float:
        return self.router.cpu_s() if self.router else 0.0


def parser() -> argparse.ArgumentParser:
    flags = flags_of("router", "Latency and throughput of the router, beside SGLang's.")
    flags.add_argument("--output", type=Path, default=ROOT / "benchmark" / "results")
    flags.add_argument("--rounds", type=int, default=3, help="of each measurement; median counts")
    flags.add_argument("--seconds", type=float, default=1.5, help="of each measurement")
    flags.add_argument("--seed", type=int, default=1, help="of the lengths of streams")
    return flags


def main() -> NoReturn:
    """Exit status 0 if every check holds."""
    flags = parser().parse_args()
    run_program("router", lambda console: run(flags, console))


def run(flags: argparse.Namespace, console: Console) -> int:
    install_upstream()
    load_before = os.getloadavg()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        rows, noise = runner.run(measure(flags.rounds, flags.seconds, random.Random(flags.seed)))
    checks = all_checks(rows)
    results = {
        "command": "python -m benchmark.router",
        "machine": describe_machine(),
        "upstream": UPSTREAM,
        "rounds": flags.rounds,
        "seconds": flags.seconds,
        "load_average": [round(load, 1) for load in load_before],
        "noise": round(noise, 3),
        "rows": rows,
        "checks": checks,
    }
    flags.output.mkdir(parents=True, exist_ok=True)
    (flags.output / "router.json").write_text(json.dumps(results, indent=1) + "\n")
    for found in rows:
        line = "  ".join(f"{key} {value}" for key, value in found.items())
        console.print(line, markup=False, soft_wrap=True)
    return conclude(checks, console)


# --- measuring ----------------------------------------------------------------------------------


async def measure(rounds: int, seconds: float, chance: random.Random) -> tuple[list[Row], float]:
    """The rows, and the share of the cores that other programs took meanwhile.

    Raises `ClusterError` if a router does not start, `RunError` if one does not answer well.
    """
    instances = [MockInstance() for _ in range(INSTANCES)]
    for instance in instances:
        await instance.start()
    router_cpus, load_cpus = divide_cpus(2)
    ports = [instance.port for instance in instances]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    with tempfile.TemporaryDirectory() as logs, ExitStack() as stack:
        ours = Router(Path(logs) / "ours.log", router_cpus, urls)
        theirs = UpstreamRouter(Path(logs) / "theirs.log", router_cpus, urls)
        for router in (ours, theirs):
            await asyncio.to_thread(stack.enter_context, router)
        targets = (
            Target(DIRECT, ports),
            Target(OURS, [ours.port], ours),
            Target(THEIRS, [theirs.port], theirs),
        )
        os.sched_setaffinity(0, load_cpus)
        gc.disable()  # its pauses would be taken for the router's
        noise = Noise()
        samples = [
            [
                {t.name: await _sample(case, t, instances, seconds, chance) for t in targets}
                for case in CASES
            ]
            for _ in range(rounds)
        ]
        share = noise.share()
    return [
        row for i, case in enumerate(CASES) for row in rows_of(case, [s[i] for s in samples])
    ], share


async def _sample(
    case: Case,
    target: Target,
    instances: Sequence[MockInstance],
    seconds: float,
    chance: random.Random,
) -> Row:
    tally = Tally()
    clients = [await _connect(case, tally, target, i, chance) for i in range(case.streams)]
    steps = [
        asyncio.create_task(instance.run_steps(STEP_S, STEP_S * i / INSTANCES))
        for i, instance in enumerate(instances)
        if case.what == "ttft"
    ]
    loading = asyncio.create_task(_load(case, clients))
    await asyncio.sleep(_WARM_UP_S)
    counted = Tally()
    for client in clients:
        client.tally = counted
    began, cpu, own = time.perf_counter(), target.cpu_s(), time.process_time()
    await asyncio.sleep(seconds)
    for client in clients:
        client.tally = tally
    took, cpu = time.perf_counter() - began, target.cpu_s() - cpu
    own = time.process_time() - own
    loading.cancel()
    await asyncio.gather(*(client.stop() for client in clients))
    for step in steps:
        step.cancel()
    if tally.errors or counted.errors:
        raise RunError(f"{target.name}: {(tally.errors + counted.errors)[0]}")
    return figures(counted, took, cpu, own)


async def _connect(
    case: Case, tally: Tally, target: Target, number: int, chance: random.Random
) -> Client:
    def client() -> Client:
        match case.what:
            case "requests":
                return Client(tally)
            case "burst":
                return BurstClient(tally)
            case "chunks":
                return StreamClient(tally, chance, _ENDLESS, pull=True)
            case _:
                mean = _MEAN_CHUNKS if case.streams > 1 else 2
                return StreamClient(tally, chance, mean, pull=False)

    port = target.ports[number % len(target.ports)]
    _, made = await asyncio.get_running_loop().create_connection(client, "127.0.0.1", port)
    return made


async def _load(case: Case, clients: Sequence[Client]) -> None:
    for client in clients:
        client.begin()
    while case.what == "burst":
        await asyncio.gather(*(client.idle.wait() for client in clients))
        for client in clients:
            client.begin()


# --- what comes of it ---------------------------------------------------------------------------


def figures(tally: Tally, took: float, router_cpu: float, load_cpu: float) -> Row:
    """One measurement of `took` seconds, with the CPU seconds of both sides."""
    found: Row = {
        "requests_per_s": tally.answers / took,
        "chunks_per_s": tally.chunks / took,
        "router_busy": router_cpu / took,
        "load_busy": load_cpu / took,
    }
    if tally.ttft:
        found |= {f"ttft_p{p}_ms": 1e3 * quantile(tally.ttft, p / 100) for p in (50, 99)}
    if router_cpu:
        found["requests_per_cpu_s"] = tally.answers / router_cpu
        found["chunks_per_cpu_s"] = tally.chunks / router_cpu
    return found


def quantile(values: Sequence[float], share: float) -> float:
    """By nearest rank: a time that some answer really took."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


def rows_of(case: Case, rounds: Sequence[dict[str, Row]]) -> list[Row]:
    """One row a target: medians of the rounds; what is added is against direct, round by round."""
    rows = []
    for target in rounds[0]:
        samples = [dict(r[target]) for r in rounds]
        for sample, r in zip(samples, rounds, strict=True):
            if target != DIRECT:
                for key in ("ttft_p50_ms", "ttft_p99_ms"):
                    if key in sample:
                        sample[f"added_{key}"] = sample[key] - r[DIRECT][key]
        medians = {key: statistics.median(s[key] for s in samples) for key in samples[0]}
        rows.append(
            {"what": case.what, "streams": case.streams, "through": target}
            | {key: round(value, 3 if value < 100 else 0) for key, value in medians.items()}
        )
    return rows


def all_checks(rows: Sequence[Row]) -> list[Row]:
    found = {(r["what"], r["streams"], r["through"]): r for r in rows}

    def ratio(what: str, key: str) -> float:
        ours, theirs = (
            next(r[key] for r in rows if (r["what"], r["through"]) == (what, through))
            for through in (OURS, THEIRS)
        )
        return float(round(ours / theirs, 3))

    return [
        *(
            check(
                f"{what} a second {how}, against {THEIRS}",
                ratio(what, f"{what}_{key}"),
                least=_SHARE,
            )
            for what in ("chunks", "requests")
            for how, key in (("of CPU time", "per_cpu_s"), ("in a closed loop", "per_s"))
        ),
        check(
            "P99 of the TTFT added at 32 streams, ms",
            found["ttft", 32, OURS]["added_ttft_p99_ms"],
            most=5,
        ),
    ]


if __name__ == "__main__":
    main()
