"""`python -m benchmark.endurance`: a cluster lives through a week's worth of trouble in 20 minutes.

`make endurance` gives it two hours. It writes `endurance.json` (`rows`, `checks`) and a picture.
Exit status 1 if a check fails.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import time
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from benchmark.checks import conclude
from benchmark.endurance.census import Census
from benchmark.endurance.crowd import Crowd
from benchmark.endurance.picture import draw
from benchmark.endurance.report import Throughput, results
from benchmark.endurance.soak import Soak
from benchmark.faults.cells import LoadKind
from benchmark.faults.cluster import HOST_NAMES, FaultedCluster, built_model
from benchmark.faults.hosts import Hosts
from benchmark.faults.load import Ask, Clients, asks
from benchmark.faults.measures import expected
from benchmark.faults.recovery import until_well
from benchmark.faults.trial import AGAIN
from benchmark.faults.watch import Admin
from benchmark.noise import cpu_s
from benchmark.program import ROOT, flags_of, run_program
from benchmark.report import dumps

_KIND = LoadKind(gathered=False, seeded=True)
_WELL_S = 240.0


def parser() -> argparse.ArgumentParser:
    flags = flags_of("endurance", "What wears out in a cluster that goes through a lot.")
    flags.add_argument("--minutes", type=float, default=20.0)
    flags.add_argument("--seed", type=int, default=1, help="of what happens, and of the load")
    flags.add_argument("--warm-s", type=float, default=120.0, help="of a process, not counted")
    flags.add_argument("--rounds", type=int, default=6, help="of measuring the throughput")
    flags.add_argument("--tokens", type=int, default=60, help="new tokens of the longest answers")
    flags.add_argument("--answer-s", type=float, default=180.0, help="time for an answer")
    flags.add_argument("--memory-budget", default="64MiB", help="parameters + KV an instance")
    flags.add_argument("--output", type=Path, default=ROOT / "benchmark" / "results")
    flags.add_argument("--logs", type=Path, default=ROOT / "build" / "endurance")
    return flags


def main() -> NoReturn:
    flags = parser().parse_args()
    run_program("endurance", lambda console: asyncio.run(run(flags, console)))


async def run(flags: argparse.Namespace, console: Console) -> int:
    """Returns the exit status."""
    model = built_model(flags.logs)
    load = asks(model, flags.tokens, _KIND)
    chance = random.Random(flags.seed)
    load_before = os.getloadavg()
    with (
        Hosts(HOST_NAMES) as hosts,
        FaultedCluster(hosts, model, flags.memory_budget, flags.logs) as cluster,
    ):
        admin = Admin(cluster.url, cluster.key)
        async with Clients(cluster.url, cluster.key, flags.answer_s) as clients:
            try:
                wanted = (await expected(clients, {_KIND: load}))[_KIND]
                await until_well(cluster, admin, _WELL_S)
                crowd = Crowd(clients, load, wanted, chance, AGAIN)
                soak = Soak(cluster, admin, crowd, Census(cluster), console.out)
                before = await throughput(cluster, admin, clients, load, flags.rounds)
                said = cluster.log_sizes()
                await soak.run(60 * flags.minutes, chance)
                after = await throughput(cluster, admin, clients, load, flags.rounds)
                tracebacks = cluster.said_since(said).count("Traceback")
            finally:
                await admin.close()
    found = results(soak.story, crowd, soak.census, (before, after), tracebacks, load_before, flags)
    flags.output.mkdir(parents=True, exist_ok=True)
    (flags.output / "endurance.json").write_text(dumps(found))
    draw(soak.story, soak.census, flags.output / "endurance.png")
    for row in found["rows"]:
        console.print(str(row), markup=False, soft_wrap=True)
    return conclude(found["checks"], console)


async def throughput(
    cluster: FaultedCluster, admin: Admin, clients: Clients, load: list[Ask], rounds: int
) -> list[Throughput]:
    """All requests at once, again and again, by instances that have nothing else to do.

    The first round does not count: some instances are new, and touch their memory first.
    """
    await clients.all(load)
    measured = []
    for _ in range(rounds):
        await admin.call("POST", "/flush_cache?timeout=10")
        began, cpu = time.perf_counter(), _cpu_s(cluster)
        answers = await clients.all(load)
        tokens = sum(len(answer.tokens) for answer in answers)
        took, used = time.perf_counter() - began, _cpu_s(cluster) - cpu
        measured.append(Throughput(tokens / took, tokens / used))
    return measured


def _cpu_s(cluster: FaultedCluster) -> float:
    return sum(cpu_s(launcher.pid) for launcher in (cluster.router, *cluster.launchers.values()))


if __name__ == "__main__":
    main()
