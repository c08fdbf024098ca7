"""`python -m benchmark.endurance`: a cluster lives through a week's worth of trouble in 20 minutes.

`make endurance` gives it two hours. It writes `endurance.json` (`rows`, `checks`) and a picture.
Exit status 1 if a check fails.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from benchmark.checks import conclude
from benchmark.endurance.census import Census
from benchmark.endurance.crowd import Crowd
from benchmark.endurance.picture import draw
from benchmark.endurance.report import results
from benchmark.endurance.soak import Soak
from benchmark.endurance.throughput import asked, in_turns
from benchmark.faults.cells import LoadKind
from benchmark.faults.cluster import HOST_NAMES, FaultedCluster, built_model
from benchmark.faults.hosts import Hosts
from benchmark.faults.load import asks
from benchmark.faults.measures import expected
from benchmark.faults.recovery import until_well
from benchmark.faults.trial import AGAIN
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
        async with asked(cluster, flags.answer_s) as worn:
            wanted = (await expected(worn.clients, {_KIND: load}))[_KIND]
            await until_well(cluster, worn.admin, _WELL_S)
            crowd = Crowd(worn.clients, load, wanted, chance, AGAIN)
            soak = Soak(cluster, worn.admin, crowd, Census(cluster), console.out)
            said = cluster.log_sizes()
            await soak.run(60 * flags.minutes, chance)
            tracebacks = cluster.said_since(said).count("Traceback")
            with FaultedCluster(hosts, model, flags.memory_budget, flags.logs / "fresh") as other:
                async with asked(other, flags.answer_s) as fresh:
                    await until_well(other, fresh.admin, _WELL_S)
                    pairs = await in_turns(worn, fresh, load, flags.rounds)
    found = results(soak.story, crowd, soak.census, pairs, tracebacks, load_before, flags)
    flags.output.mkdir(parents=True, exist_ok=True)
    (flags.output / "endurance.json").write_text(dumps(found))
    draw(soak.story, soak.census, flags.output / "endurance.png")
    for row in found["rows"]:
        console.print(str(row), markup=False, soft_wrap=True)
    return conclude(found["checks"], console)


if __name__ == "__main__":
    main()
