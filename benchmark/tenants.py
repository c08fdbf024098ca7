"""Two tenants, one of whom floods the cluster: what becomes of the other.

`python -m benchmark.tenants` needs no model. The router is a process of its own with its own queue
and dispatch; behind it two instances serve as the simulator's profile of a GPU says, in real time.
`calm` sends few requests, on time however busy the cluster is. `burst` keeps hundreds under way,
many times what the instances have slots for. It writes `tenants.json` with `rows` and `checks`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import aiohttp
import msgspec
from rich.console import Console

from benchmark.batching import BatchingInstance
from benchmark.checks import check, conclude
from benchmark.experiment import RunError
from benchmark.hostile.router import RouterProcess, runtime_folder
from benchmark.noise import Noise
from benchmark.program import ROOT, flags_of, run_program
from benchmark.report import describe_machine
from benchmark.router_report import quantile
from kunserve_sglang.simulation.cluster_profile import Profile, load_profile

PROFILE = "qwen2.5-14b-a800"
MEMORY = "34GiB"
"""Of an instance: parameters, and some twenty thousand token slots."""

INSTANCES = 2
CLIENTS = 200
"""Requests that a flood keeps under way."""

PER_SECOND = 3.0
_WARM_UP_S = 8.0
_READY_S = 30.0

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
CASES = (
    Case("calm alone", True, ()),
    Case("flood, nobody told apart", True, ("burst",)),
    Case("flood, tenants", True, ("burst",), EQUAL),
    Case(
        "flood, tenants, one limited", True, ("burst",), tenants(burst="max_requests = 40", calm="")
    ),
    Case("burst alone", False, ("burst",)),
    Case("burst alone, tenants", False, ("burst",), EQUAL),
    Case(
        "two floods, weights 3 to 1",
        False,
        ("heavy", "light"),
        tenants(heavy="weight = 3", light=""),
    ),
)


@dataclass
class Seen:
    """What clients saw since the measurement began."""

    ttft_s: list[float] = field(default_factory=list)
    tokens: dict[str, int] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)


class Load:
    """The clients of one case."""

    def __init__(self, url: str, session: aiohttp.ClientSession, seed: int) -> None:
        self.seen = Seen()
        self._url = f"{url}/generate"
        self._session = session
        self._seed = seed

    async def flood(self, name: str) -> None:
        """As many clients, each with its next request as soon as it has an answer."""
        chances = (random.Random(f"{self._seed} {name} {i}") for i in range(CLIENTS))
        await asyncio.gather(*(self._client(name, chance) for chance in chances))

    async def calm(self, seconds: float) -> None:
        """Requests whose times were drawn beforehand; returns when all have their answers."""
        chance = random.Random(f"{self._seed} calm")
        began, at = time.perf_counter(), 0.0
        async with asyncio.TaskGroup() as tasks:
            while (at := at + chance.expovariate(PER_SECOND)) < seconds:
                body = _body(chance, chance.randint(500, 1500), 50, stream=True)
                await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
                tasks.create_task(self._timed(body))

    async def _client(self, name: str, chance: random.Random) -> None:
        while True:
            prompt, output = chance.randint(100, 400), chance.randint(100, 400)
            async with self._ask(name, _body(chance, prompt, output, stream=False)) as answer:
                await answer.read()
            if answer.status != 200:
                self.seen.errors.append(f"{name}: {answer.status}")
                await asyncio.sleep(1)
            self.seen.tokens[name] = self.seen.tokens.get(name, 0) + prompt + output

    async def _timed(self, body: bytes) -> None:
        sent = time.perf_counter()
        async with self._ask("calm", body) as answer:
            async for _ in answer.content.iter_any():
                self.seen.ttft_s.append(time.perf_counter() - sent)
                break
            rest = await answer.read()
        if answer.status != 200 or not rest.endswith(b"[DONE]\n\n"):
            self.seen.errors.append(f"calm: {answer.status}")

    @asynccontextmanager
    async def _ask(self, name: str, body: bytes) -> AsyncIterator[aiohttp.ClientResponse]:
        headers = {"Authorization": f"Bearer key-of-{name}", "Content-Type": "application/json"}
        async with self._session.post(self._url, data=body, headers=headers) as answer:
            yield answer


def _body(chance: random.Random, prompt: int, output: int, *, stream: bool) -> bytes:
    ids = [chance.randrange(50_000) for _ in range(prompt)]
    fields = {"input_ids": ids, "sampling_params": {"max_new_tokens": output}, "stream": stream}
    return msgspec.json.encode(fields)


# --- measuring ----------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    flags = flags_of("tenants", "Whether one tenant's burst is everybody's.")
    flags.add_argument("--output", type=Path, default=ROOT / "benchmark" / "results")
    flags.add_argument("--seconds", type=float, default=90.0, help="of each case")
    flags.add_argument("--seed", type=int, default=1, help="of times and lengths")
    return flags


def main() -> NoReturn:
    """Exit status 0 if every check holds."""
    flags = parser().parse_args()
    run_program("tenants", lambda console: run(flags, console))


def run(flags: argparse.Namespace, console: Console) -> int:
    profile = msgspec.structs.replace(load_profile(Path(PROFILE)), memory_budget=MEMORY)
    noise = Noise()
    rows: list[Row] = []
    for case in CASES:
        rows.append(asyncio.run(measure(case, profile, flags.seconds, flags.seed)))
        line = "  ".join(f"{key} {value}" for key, value in rows[-1].items())
        console.print(line, markup=False, soft_wrap=True)
    checks = all_checks({row["case"]: row for row in rows})
    results = {
        "command": "python -m benchmark.tenants",
        "machine": describe_machine(),
        "profile": PROFILE,
        "seconds": flags.seconds,
        "noise": round(noise.share(), 3),
        "rows": rows,
        "checks": checks,
    }
    flags.output.mkdir(parents=True, exist_ok=True)
    (flags.output / "tenants.json").write_text(json.dumps(results, indent=1) + "\n")
    return conclude(checks, console)


async def measure(case: Case, profile: Profile, seconds: float, seed: int) -> Row:
    """One case from beginning to end. Raises `RunError` if a request fails."""
    instances = [BatchingInstance(number, profile) for number in range(INSTANCES)]
    with runtime_folder() as name, tempfile.TemporaryDirectory() as files:
        settings = {}
        if case.tenants is not None:
            path = Path(files) / "tenants.toml"
            path.write_text(case.tenants)
            settings["tenants"] = str(path)
        router = RouterProcess(Path(name), INSTANCES, **settings)
        await asyncio.to_thread(router.__enter__)
        try:
            for instance in instances:
                await instance.start(router.control_address)
            async with asyncio.timeout(_READY_S):
                while not await asyncio.to_thread(router.healthy, INSTANCES):  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
            return await _loaded(case, router.url, instances, seconds, seed)
        finally:
            for instance in instances:
                await instance.stop()
            await asyncio.to_thread(router.__exit__)


async def _loaded(
    case: Case, url: str, instances: list[BatchingInstance], seconds: float, seed: int
) -> Row:
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        load = Load(url, session, seed)
        floods = [asyncio.create_task(load.flood(name)) for name in case.floods]
        await asyncio.sleep(_WARM_UP_S)
        load.seen = Seen()
        began, before = time.perf_counter(), _produced(instances)
        await asyncio.sleep(0) if case.calm else await asyncio.sleep(seconds)
        if case.calm:
            await load.calm(seconds)
        took = time.perf_counter() - began
        row = _row(case, load.seen, (_produced(instances) - before) / took)
        for flood in floods:
            flood.cancel()
        ended = await asyncio.gather(*floods, return_exceptions=True)
    failed = [e for e in ended if not isinstance(e, asyncio.CancelledError)]
    if failed or load.seen.errors:
        raise RunError(f"{case.name}: {(failed + load.seen.errors)[0]}")
    return row


def _produced(instances: list[BatchingInstance]) -> int:
    return sum(instance.produced for instance in instances)


def _row(case: Case, seen: Seen, per_s: float) -> Row:
    row: Row = {"case": case.name, "tokens_per_s": round(per_s)}
    if seen.ttft_s:
        row["requests"] = len(seen.ttft_s)
        for share in (0.5, 0.9, 0.99):
            row[f"ttft_p{share * 100:g}_ms"] = round(1e3 * quantile(seen.ttft_s, share))
    if len(case.floods) > 1:
        first, second = (seen.tokens[name] for name in case.floods)
        row["ratio"] = round(first / second, 3)
    return row


def all_checks(rows: dict[str, Row]) -> list[dict[str, Any]]:
    """What has to hold, by the rows of all cases."""

    def ratio(what: str, of: str, to: str) -> float:
        found: float = round(rows[of][what] / rows[to][what], 3)
        return found

    def p99(of: str) -> float:
        return ratio("ttft_p99_ms", of, "calm alone")

    throughput = ratio("tokens_per_s", "burst alone, tenants", "burst alone")
    weights = rows["two floods, weights 3 to 1"]["ratio"]
    return [
        check("P99 TTFT beside a flood, of that alone", p99("flood, tenants"), most=1.3),
        check("and where the flood is limited", p99("flood, tenants, one limited"), most=1.3),
        check("without tenants it is far worse", p99("flood, nobody told apart"), least=2.0),
        check("throughput of the flood alone, with tenants to without", throughput, least=0.9),
        check("tokens of two floods, weights 3 to 1: at least", weights, least=2.7),
        check("and at most", weights, most=3.3),
    ]


if __name__ == "__main__":
    main()
