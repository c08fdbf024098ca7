"""Two tenants, one of whom floods the cluster: what becomes of the other.

`python -m benchmark.tenants` needs no model. The router's own queue and dispatch run, before
instances that serve as a profile of the simulator says, in virtual time: so figures are the same on
any machine. `calm` sends few requests, on time however busy the cluster is. `burst` keeps hundreds
under way, many times what the instances have slots for. It writes `tenants.json` with `rows` and
`checks`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

import msgspec
from rich.console import Console

from benchmark.checks import check, conclude
from benchmark.program import ROOT, flags_of, run_program
from benchmark.report import describe_machine
from benchmark.router_report import quantile
from benchmark.tenant_cluster import Cluster
from benchmark.virtual_time import VirtualTimeLoop
from kunserve_sglang.simulation.cluster_profile import Profile, load_profile

PROFILE = "qwen2.5-14b-a800"
MEMORY = "34GiB"
"""Of an instance: parameters, and some thirty thousand token slots."""

CLIENTS = 200
"""Requests that a flood keeps under way."""

PER_SECOND = 3.0
_WARM_UP_S = 10.0

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Case:
    """Who is there, with which tenants (None: nobody is told apart)."""

    name: str
    calm: bool
    floods: tuple[str, ...]
    tenants: str | None = None


def tenants(**lines: str) -> str:
    return "".join(
        f'[[tenants]]\nname = "{name}"\nkey = "key-of-{name}"\n{further}\n'
        for name, further in lines.items()
    )


EQUAL = tenants(burst="", calm="")
LIMITED = tenants(burst="max_requests = 40", calm="")
WEIGHTED = tenants(heavy="weight = 3", light="")
ALONE_BEFORE, ALONE = "calm alone, nobody told apart", "calm alone, tenants"
UNTOLD, SHARED = "flood, nobody told apart", "flood, tenants"
CAPPED, BURST = "flood, tenants, one limited", "burst alone"
BURST_SHARED, TWO = "burst alone, tenants", "two floods, weights 3 to 1"
CASES = (
    Case(ALONE_BEFORE, True, ()),
    Case(ALONE, True, (), EQUAL),
    Case(UNTOLD, True, ("burst",)),
    Case(SHARED, True, ("burst",), EQUAL),
    Case(CAPPED, True, ("burst",), LIMITED),
    Case(BURST, False, ("burst",)),
    Case(BURST_SHARED, False, ("burst",), EQUAL),
    Case(TWO, False, ("heavy", "light"), WEIGHTED),
)


class Load:
    """The clients of one case, and what they saw."""

    def __init__(self, cluster: Cluster, seed: int) -> None:
        self.ttft_s: list[float] = []
        self.tokens: Counter[str] = Counter()
        self._cluster = cluster
        self._seed = seed

    async def flood(self, name: str) -> None:
        """As many clients, each with its next request as soon as it has an answer."""
        chances = (random.Random(f"{self._seed} {name} {i}") for i in range(CLIENTS))
        await asyncio.gather(*(self._client(name, chance) for chance in chances))

    async def calm(self, seconds: float) -> None:
        """Requests whose times do not depend on answers; returns when all have theirs."""
        chance = random.Random(f"{self._seed} calm")
        end = self._cluster.clock() + seconds
        async with asyncio.TaskGroup() as tasks:
            while self._cluster.clock() < end:
                await asyncio.sleep(chance.expovariate(PER_SECOND))
                tasks.create_task(self._timed(chance.randint(500, 1500)))

    async def _client(self, name: str, chance: random.Random) -> None:
        while True:
            prompt, output = chance.randint(100, 400), chance.randint(100, 400)
            await self._cluster.ask(name, prompt, output)
            self.tokens[name] += prompt + output

    async def _timed(self, prompt: int) -> None:
        self.ttft_s.append(await self._cluster.ask("calm", prompt, 50))


# --- measuring ----------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    flags = flags_of("tenants", "Whether one tenant's burst is everybody's.")
    flags.add_argument("--output", type=Path, default=ROOT / "benchmark" / "results")
    flags.add_argument("--seconds", type=float, default=300.0, help="of each case, virtual")
    flags.add_argument("--seeds", type=int, default=3, help="of times and lengths; all count")
    return flags


def main() -> NoReturn:
    """Exit status 0 if every check holds."""
    flags = parser().parse_args()
    run_program("tenants", lambda console: run(flags, console))


def run(flags: argparse.Namespace, console: Console) -> int:
    rows: list[Row] = []
    for case in CASES:
        rows.append(measure(case, flags.seconds, range(1, flags.seeds + 1)))
        line = "  ".join(f"{key} {value}" for key, value in rows[-1].items())
        console.print(line, markup=False, soft_wrap=True)
    checks = all_checks({row["case"]: row for row in rows})
    results = {
        "command": "python -m benchmark.tenants",
        "machine": describe_machine(),
        "profile": PROFILE,
        "seconds": flags.seconds,
        "seeds": flags.seeds,
        "rows": rows,
        "checks": checks,
    }
    flags.output.mkdir(parents=True, exist_ok=True)
    (flags.output / "tenants.json").write_text(json.dumps(results, indent=1) + "\n")
    return conclude(checks, console)


def measure(case: Case, seconds: float, seeds: Sequence[int]) -> Row:
    """One case with each seed; what was seen in all of them."""
    profile = msgspec.structs.replace(load_profile(Path(PROFILE)), memory_budget=MEMORY)
    ttft_s: list[float] = []
    tokens: Counter[str] = Counter()
    rates = []
    for seed in seeds:
        with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
            load, rate = runner.run(_loaded(case, profile, seconds, seed))
        ttft_s += load.ttft_s
        tokens += load.tokens
        rates.append(rate)
    return _row(case, ttft_s, tokens, sum(rates) / len(rates))


async def _loaded(case: Case, profile: Profile, seconds: float, seed: int) -> tuple[Load, float]:
    """Also returns the tokens a second that the cluster made meanwhile."""
    cluster = Cluster(profile, case.tenants)
    load = Load(cluster, seed)
    tasks = [asyncio.create_task(instance.run()) for instance in cluster.instances]
    tasks += [asyncio.create_task(load.flood(name)) for name in case.floods]
    await asyncio.sleep(_WARM_UP_S)
    load.tokens.clear()
    began, before = cluster.clock(), cluster.produced()
    await (load.calm(seconds) if case.calm else asyncio.sleep(seconds))
    rate = (cluster.produced() - before) / (cluster.clock() - began)
    for task in tasks:
        task.cancel()
    for ended in await asyncio.gather(*tasks, return_exceptions=True):
        if not isinstance(ended, asyncio.CancelledError):
            raise cast(BaseException, ended)
    return load, rate


def _row(case: Case, ttft_s: list[float], tokens: Counter[str], per_s: float) -> Row:
    row: Row = {"case": case.name, "tokens_per_s": round(per_s)}
    if ttft_s:
        row["requests"] = len(ttft_s)
        for share in (0.5, 0.9, 0.99):
            row[f"ttft_p{share * 100:g}_ms"] = round(1e3 * quantile(ttft_s, share), 1)
    if len(case.floods) > 1:
        first, second = (tokens[name] for name in case.floods)
        row["ratio"] = round(first / second, 3)
    return row


def all_checks(rows: dict[str, Row]) -> list[dict[str, Any]]:
    """What has to hold, by the rows of all cases."""

    def ratio(what: str, of: str, to: str) -> float:
        found: float = round(rows[of][what] / rows[to][what], 3)
        return found

    def p99(of: str) -> float:
        """Over that alone, in whichever way it is the shorter."""
        return max(ratio("ttft_p99_ms", of, alone) for alone in (ALONE, ALONE_BEFORE))

    throughput = ratio("tokens_per_s", BURST_SHARED, BURST)
    weights = rows[TWO]["ratio"]
    return [
        check("P99 TTFT beside a flood, of that alone", p99(SHARED), most=1.3),
        check("and where the flood is limited", p99(CAPPED), most=1.3),
        check("without tenants, to show that there is a flood", p99(UNTOLD), least=2.0),
        check("throughput of the flood alone, with tenants to without", throughput, least=0.9),
        check("tokens of two floods, weights 3 to 1", weights, least=2.7),
        check("and not more", weights, most=3.3),
    ]


if __name__ == "__main__":
    main()
