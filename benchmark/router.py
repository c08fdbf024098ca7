"""The router alone, beside SGLang's own in Rust: what it adds to TTFT, and what a core carries.

`python -m benchmark.router` needs no model: mock instances answer at once. Both routers are up all
the time, on the same core that nothing else of the benchmark uses, and are loaded in turns with the
instances themselves. It writes `router.json` with `rows` (medians of the rounds) and `checks` (each
with its bar). With `--before` another checkout of ours takes part, and what has become slower since
is checked instead of what is published.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import random
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import uvloop
from rich.console import Console

from benchmark.checks import conclude
from benchmark.experiment import RunError
from benchmark.noise import Noise
from benchmark.program import ROOT, flags_of, run_program
from benchmark.report import describe_machine
from benchmark.router_load import BurstClient, Client, MockInstance, StreamClient, Tally
from benchmark.router_report import (
    BEFORE,
    DIRECT,
    OURS,
    THEIRS,
    Case,
    Row,
    all_checks,
    figures,
    no_slower,
    rows_of,
)
from benchmark.routers import UPSTREAM, Router, UpstreamRouter, install_upstream
from kunserve_sglang.core.processes import divide_cpus

INSTANCES = 4
STEP_S = 0.02
"""A decode step of the mock instances: the time between the chunks of a stream."""

_WARM_UP_S = 0.3
_ENDLESS = 500_000
_MEAN_CHUNKS = 20

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
    flags.add_argument("--before", type=Path, help="a checkout to compare with, for --output")
    return flags


def main() -> NoReturn:
    """Exit status 0 if every check holds."""
    flags = parser().parse_args()
    run_program("router", lambda console: run(flags, console))


def run(flags: argparse.Namespace, console: Console) -> int:
    install_upstream()
    load_before = os.getloadavg()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        chance = random.Random(flags.seed)
        rows, noise = runner.run(measure(flags.rounds, flags.seconds, chance, flags.before))
    checks = no_slower(rows) if flags.before else all_checks(rows)
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


async def measure(
    rounds: int, seconds: float, chance: random.Random, before: Path | None = None
) -> tuple[list[Row], float]:
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
        routers = {OURS: Router(Path(logs) / "ours.log", router_cpus, urls)}
        if before:
            routers[BEFORE] = Router(Path(logs) / "before.log", router_cpus, urls, before)
        routers[THEIRS] = UpstreamRouter(Path(logs) / "theirs.log", router_cpus, urls)
        for router in routers.values():
            await asyncio.to_thread(stack.enter_context, router)
        targets = (
            Target(DIRECT, ports),
            *(Target(name, [router.port], router) for name, router in routers.items()),
        )
        os.sched_setaffinity(0, load_cpus)
        gc.disable()  # its pauses would be taken for the router's
        noise = Noise()
        samples = [
            [
                # There and back again: the machine may be getting faster or slower.
                {
                    t.name: await _sample(case, t, instances, seconds, chance)
                    for t in targets[:: -1 if turn % 2 else 1]
                }
                for case in CASES
            ]
            for turn in range(rounds)
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


if __name__ == "__main__":
    main()
