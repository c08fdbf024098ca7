"""The same faults against upstream SGLang: two plain servers behind its own router, with retries.

Whoever dies there is started again by this program, as a supervisor would. A server has a host of
its own, and so has the router, whose health checks and circuit breakers are as they come.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from rich.console import Console

from benchmark.experiment import RunError
from benchmark.faults.cells import Cause, Cell, LoadKind, Phase, Target, away
from benchmark.faults.cluster import FIRST, ROUTER, SECOND, SGLANG_FLAGS
from benchmark.faults.hosts import Hosts
from benchmark.faults.load import Ask, Clients, asks
from benchmark.faults.measures import expected
from benchmark.faults.processes import send
from benchmark.faults.rows import UPSTREAM, Row
from benchmark.faults.rows import about as of
from benchmark.faults.trial import CUT_S, PAUSE_S
from benchmark.faults.verdicts import LOST, OK, REPEATED, WRONG, Answer, counts, in_flight
from benchmark.routers import install_upstream, upstream_python
from kunserve_sglang.core.processes import divide_cpus, family, free_port
from kunserve_sglang.testing.cluster import Cluster
from kunserve_sglang.testing.upstream import CPU, PlainServer, unpack_upstream

_SLOTS = 6000
_READY_S = 300.0
_LOOK_S = 0.1
_SERVERS = (FIRST, SECOND)


class SglangRouter(Cluster):
    """Upstream's router on a host of its own, before servers on others."""

    def __init__(self, log: Path, hosts: Hosts, workers: Sequence[str]) -> None:
        super().__init__(self._made, log, ready_timeout_s=_READY_S)
        self._hosts = hosts
        self._workers = workers

    def ready_url(self) -> str:
        """Once it has found all servers healthy."""
        url = f"http://{self._hosts.address(ROUTER)}:{self._port}"
        return url if _healthy(url) == len(self._workers) else ""

    def _made(self, port: int) -> list[str]:
        command = [
            *(str(upstream_python()), "-m", "sglang_router.launch_router"),
            *("--host", self._hosts.address(ROUTER), "--port", str(port)),
            *("--worker-urls", *self._workers, "--policy", "round_robin"),
            *("--max-concurrent-requests", "-1", "--log-level", "error"),
            *("--prometheus-port", str(free_port())),
        ]
        return self._hosts.command(ROUTER, command)


class UpstreamSystem:
    """Context manager: two servers and a router, each of which can be started again."""

    def __init__(self, hosts: Hosts, model: Path, logs: Path) -> None:
        self._hosts = hosts
        self._model = model
        self._logs = logs
        self._stack = ExitStack()
        self._parts: dict[str, Cluster] = {}

    def __enter__(self) -> Self:
        install_upstream()
        with self._stack as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="upstream-")))
            unpack_upstream(folder)
            self._folder = folder
            stack.callback(self._stop)
            for name in _SERVERS:
                self._parts[name] = self._server(name)
                self._parts[name].start()
            for name in _SERVERS:
                self._parts[name].__enter__()
            self.start_router()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def url(self) -> str:
        return self._parts[ROUTER].url

    def family(self, name: str) -> list[Any]:
        return family(self._parts[name].pid)

    def start_router(self) -> None:
        workers = [self._parts[name].url for name in _SERVERS]
        log = self._logs / "faults-upstream-router.log"
        self._parts[ROUTER] = SglangRouter(log, self._hosts, workers)
        self._parts[ROUTER].__enter__()

    def make_well(self, struck: str) -> None:
        """Start again what was struck, at a new address; so the router has to learn it anew."""
        send(self.family(struck), signal.SIGKILL)
        self._parts[struck].stop()
        if struck != ROUTER:
            self._parts[ROUTER].stop()
            self._parts[struck] = self._server(struck)
            self._parts[struck].__enter__()
        self.start_router()

    def _server(self, name: str) -> PlainServer:
        flags = ("--model-path", str(self._model), "--max-total-tokens", str(_SLOTS))
        position = _SERVERS.index(name)
        return PlainServer(
            self._folder,
            (*flags, *SGLANG_FLAGS, *CPU.flags),
            {**CPU.environment, "PYTHONPATH": str(self._folder)},
            divide_cpus(len(_SERVERS))[position],
            self._logs / f"faults-upstream-{name}.log",
            ready_timeout_s=_READY_S,
            stop_timeout_s=10.0,
            host=self._hosts.address(name),
            through=self._hosts.command(name, ()),
        )

    def _stop(self) -> None:
        for part in self._parts.values():
            part.stop()


@dataclass(frozen=True, slots=True)
class _Trials:
    system: UpstreamSystem
    hosts: Hosts
    load: Sequence[Ask]
    wanted: Sequence[Sequence[object]]
    answer_s: float

    async def run(self, cell: Cell) -> Row:
        name = {Target.ROUTER: ROUTER, Target.HOST: SECOND}.get(cell.target, FIRST)
        async with Clients(self.system.url, "", self.answer_s) as clients:
            sent = clients.send(self.load)
            answers = [s.answer for s in sent]
            await self._all_begun(answers)
            struck = time.monotonic()
            restart = asyncio.create_task(self._suffer(cell, name))
            await asyncio.gather(*(s.task for s in sent))
            await restart
        verdicts = counts(answers, self.wanted)
        row: Row = {
            "requests": len(answers),
            "in_flight": in_flight(answers, struck),
            **{kind: verdicts[kind] for kind in (OK, LOST, WRONG, REPEATED)},
            "asked_again": sum(a.asked > 1 for a in answers),
        }
        errors = sorted({a.error for a in answers if a.error})
        return row | ({"errors": errors[:5]} if errors else {})

    async def _all_begun(self, answers: Sequence[Answer]) -> None:
        """All streams have tokens; plain requests were sent with them."""
        deadline = time.monotonic() + 60
        while not all(a.events for a, ask in zip(answers, self.load, strict=True) if ask.streams):
            if time.monotonic() > deadline:
                raise RunError("upstream's servers do not answer")
            await asyncio.sleep(_LOOK_S)

    async def _suffer(self, cell: Cell, name: str) -> None:
        struck = self.system.family(name)
        if cell.cause.is_cut:
            others = [n for n in (ROUTER, *_SERVERS) if n != name]
            fro = cell.cause is Cause.BOTH_WAYS or away(cell)
            to = cell.cause is Cause.BOTH_WAYS or not fro
            self.hosts.cut_off(name, others, to=to, fro=fro)
            await asyncio.sleep(CUT_S)
            self.hosts.heal()
        elif cell.cause is Cause.KILL:
            if cell.target is Target.HOST and not self.hosts.why_not:
                self.hosts.cut_off(name, (ROUTER, FIRST), to=True, fro=True)
            send(struck, signal.SIGKILL)
        else:
            send(struck, signal.SIGSTOP)
            if cell.cause is Cause.PAUSE:
                await asyncio.sleep(PAUSE_S)
                send(struck, signal.SIGCONT)

    def make_well(self, cell: Cell) -> None:
        self.hosts.heal()
        name = {Target.ROUTER: ROUTER, Target.HOST: SECOND}.get(cell.target, FIRST)
        if cell.cause in (Cause.KILL, Cause.STOP):
            self.system.make_well(name)


async def run_upstream(
    about: dict[str, Any], add: Callable[[Row], None], console: Console, deadline: float
) -> None:
    """Every target and cause once; phases are ours, so all of these are independent.

    Its router has nobody who starts it again at once, so what its death costs says nothing.
    """
    hosts: Hosts = about["hosts"]
    cells = [
        Cell(target, cause, Phase.INDEPENDENT)
        for cause in map(Cause, about["causes"])
        for target in map(Target, about["targets"])
        if target is not Target.STAGE
    ]
    cells = [
        c for c in cells if (UPSTREAM, *c.key) not in about["known"] and not c.ends_connections
    ]
    if not cells or time.monotonic() >= deadline:
        return
    greedy = LoadKind(gathered=False, seeded=False)
    # Its router takes completions with text for a prompt only, and tokens are what is compared.
    load = asks(about["model"], about["tokens"], greedy, completions=False)
    with UpstreamSystem(hosts, about["model"], about["logs"]) as system:
        async with Clients(system.url, "", about["answer_s"]) as clients:
            wanted = (await expected(clients, {greedy: load}))[greedy]
        trials = _Trials(system, hosts, load, wanted, about["answer_s"])
        for cell in cells:
            if time.monotonic() >= deadline:
                return
            row = of(UPSTREAM, cell)
            if hosts.why_not and (cell.cause.is_cut or cell.target is Target.HOST):
                add({**row, "why_not": hosts.why_not})
                continue
            row |= await trials.run(cell)
            add(row)
            console.print(f"upstream: {row}", markup=False, soft_wrap=True)
            await asyncio.to_thread(trials.make_well, cell)


def _healthy(url: str) -> int:
    """How many servers the router at `url` finds healthy; 0 before it answers."""

    with (
        contextlib.suppress(OSError, KeyError, ValueError),
        urllib.request.urlopen(f"{url}/readiness", timeout=5) as answer,
    ):
        return int(json.load(answer)["healthy_workers"])
    return 0
