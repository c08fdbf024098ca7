"""One cell: requests, a transition, a fault in the middle of it, and what came of all."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil

from benchmark.experiment import RunError
from benchmark.faults.cells import IN_GROUP, Cause, Cell, LoadKind, Target, Transition, away, gate
from benchmark.faults.cluster import FIRST, INSTANCES, ROUTER, SECOND, FaultedCluster
from benchmark.faults.load import Ask, Clients
from benchmark.faults.processes import scheduler_of, send, stands_still
from benchmark.faults.readiness import Missed, all_run, begin, completed, gathered, outcome, running
from benchmark.faults.recovery import until_well
from benchmark.faults.verdicts import Answer, in_flight
from benchmark.faults.watch import Admin, Seen, Watch, watching

PAUSE_S = 5.0
CUT_S = 15.0
AGAIN = 20
"""How often a client asks whose router is not there."""

_ATTEMPTS = 3
"""A cell whose requests end too early on a busy machine is tried again, and said to be missed only
then."""

_GATE_S = 20.0
_RESUMED = "kunserve:streams_resumed_total"
_FOR_GOOD = (Cause.KILL, Cause.STOP)


@dataclass(slots=True)
class Trial:
    """What happened. Times are seconds of one clock; `struck` is that of the fault.

    `answers` are in the order of the requests. `well_s` is from the fault until the cluster was as
    before, None if that took too long and it is `unwell`. `point` says where the fault struck.
    """

    cell: Cell
    struck: float = 0.0
    began: float = 0.0
    point: str = ""
    victims: tuple[int, ...] = ()
    answers: list[Answer] = field(default_factory=list)
    watch: Watch = field(default_factory=Watch)
    routers: list[tuple[float, int]] = field(default_factory=list)
    running_at: dict[int, int] = field(default_factory=dict)
    before: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    well_s: float | None = None
    unwell: str = ""
    resumed: float = 0.0
    why_not: str = ""
    said: str = ""


class Conductor:
    """Takes one cluster through one cell after the other."""

    def __init__(
        self,
        cluster: FaultedCluster,
        loads: Mapping[LoadKind, Sequence[Ask]],
        answer_s: float,
        well_limit_s: float,
    ) -> None:
        self._cluster = cluster
        self._loads = loads
        self._answer_s = answer_s
        self._well_limit_s = well_limit_s

    async def run(self, cell: Cell) -> Trial:
        """Raises `RunError` if the cluster is not well before it begins."""
        trial = Trial(cell)
        for _ in range(_ATTEMPTS):
            trial = await self._attempt(cell)
            if not trial.why_not or trial.unwell:
                break
        return trial

    async def _attempt(self, cell: Cell) -> Trial:
        trial = Trial(cell)
        admin = Admin(self._cluster.url, self._cluster.key)
        try:
            await until_well(self._cluster, admin, self._well_limit_s)
            before = self._cluster.log_sizes()
            try:
                await self._run(trial, admin)
            except Missed as missed:
                trial.why_not = str(missed)
            finally:
                self._cluster.gates.open()
                self._cluster.hosts.heal()
            if trial.struck and cell.target is Target.HOST and cell.cause in _FOR_GOOD:
                await asyncio.to_thread(self._cluster.relaunch, SECOND, trial.victims)
            try:
                await until_well(self._cluster, admin, self._well_limit_s)
                trial.well_s = time.monotonic() - (trial.struck or time.monotonic())
            except RunError as error:
                trial.unwell = str(error)
            finally:
                trial.said = self._cluster.said_since(before)
        finally:
            await admin.close()
        return trial

    async def _run(self, trial: Trial, admin: Admin) -> None:
        cell = trial.cell
        await admin.call("POST", "/flush_cache?timeout=10")
        if cell.phase in IN_GROUP:
            await completed(admin, Transition.DROP)
        key, limit = self._cluster.key, self._answer_s
        async with Clients(self._cluster.url, key, limit) as clients:
            if cell.gathered:
                await gathered(self._loads[cell.load][0], clients, admin, self._is_gathered)
            again = AGAIN if cell.ends_connections else 0
            async with watching(admin, lambda: self._note_router(trial)) as trial.watch:
                trial.began = time.monotonic()
                sent = clients.send(self._loads[cell.load], again=again)
                trial.answers = [s.answer for s in sent]
                try:
                    resumed = await admin.metric(_RESUMED)
                    found = await all_run(self._loads[cell.load], trial.answers, admin)
                    trial.before, trial.running_at = found, running(found)
                    await self._strike(trial, admin)
                finally:
                    await asyncio.gather(*(s.task for s in sent))
                now = await admin.metric(_RESUMED)
                trial.resumed = now - (resumed if now >= resumed else 0.0)  # the next router's own

    # -- the fault -------------------------------------------------------------------------------

    async def _strike(self, trial: Trial, admin: Admin) -> None:
        cell, cluster = trial.cell, self._cluster
        hosts = {n: cluster.host_of(i["url"]) for n, i in trial.before.items()}
        alone = next(n for n, host in sorted(hosts.items()) if host == FIRST)
        if cell.gathered and trial.running_at[alone]:
            raise Missed(f"the stage has {trial.running_at[alone]} requests of its own")
        if cell.target is Target.OWNER and not trial.running_at[alone]:
            raise Missed("the owner has no requests")
        victims = {
            Target.ROUTER: [],
            Target.OWNER: [alone],
            Target.STAGE: [alone],
            Target.HOST: [n for n, host in sorted(hosts.items()) if host == SECOND],
        }[cell.target]
        trial.victims = tuple(victims)
        urls = {n: str(i["url"]) for n, i in trial.before.items()}
        struck = self._processes(cell, hosts, urls, victims)
        waiting = await self._shut(trial, hosts, urls, victims or [alone])
        task = None
        if cell.transition is not None:
            task = asyncio.create_task(begin(admin, cell.transition, hosts))
        if waiting is not None:
            try:
                if not await stands_still(waiting.pid, _GATE_S):
                    why = outcome(*task.result()) if task and task.done() else "under way"
                    raise Missed(f"{trial.point} was not reached: {why}")
                await self._suffer(trial, struck, waiting)
            finally:
                self._cluster.gates.open()
                if waiting not in struck or not trial.struck:
                    send([waiting], signal.SIGCONT)
        else:
            await self._suffer(trial, struck, None)
        if task is not None:
            await task

    def _processes(
        self, cell: Cell, hosts: Mapping[int, str], urls: Mapping[int, str], victims: Sequence[int]
    ) -> list[psutil.Process]:
        """Those that get a signal; none where connections are cut."""
        if cell.cause.is_cut:
            return []
        if cell.target is Target.ROUTER:
            return [self._cluster.router_process()]
        if cell.target is Target.HOST:
            return self._cluster.all_of(SECOND)
        return [p for n in victims for p in self._cluster.instance(hosts[n], urls[n])]

    async def _shut(
        self,
        trial: Trial,
        hosts: Mapping[int, str],
        urls: Mapping[int, str],
        members: Sequence[int],
    ) -> psutil.Process | None:
        """Who is to stand still at the gate of the phase, if there is one."""
        found = gate(trial.cell)
        if found is None:
            trial.point = "at any moment"
            return None
        trial.point = f"{found.point}:{found.nth}"
        if found.of_router:
            self._cluster.gates.shut(found.point, found.nth, None)
            return self._cluster.router_process()
        member = members[0]
        self._cluster.gates.shut(found.point, found.nth, member)
        return scheduler_of(self._cluster.instance(hosts[member], urls[member]))

    async def _suffer(
        self, trial: Trial, struck: Sequence[psutil.Process], waiting: psutil.Process | None
    ) -> None:
        """The fault itself; returns when it is over, or is there for good."""
        cell, hosts = trial.cell, self._cluster.hosts
        self._cluster.gates.open()
        now = time.monotonic()
        if not in_flight(trial.answers, now):
            raise Missed("all answers were there before the fault")
        trial.struck = now
        if cell.cause.is_cut:
            self._cut(cell)
            if waiting is not None:
                send([waiting], signal.SIGCONT)
            await asyncio.sleep(CUT_S)
            hosts.heal()
        elif cell.cause is Cause.KILL:
            if cell.target is Target.HOST and not hosts.why_not:
                # Without power nobody says goodbye.
                hosts.cut_off(SECOND, (ROUTER, FIRST), to=True, fro=True)
            send(struck, signal.SIGKILL)
        else:
            send(struck, signal.SIGSTOP)
            if waiting is not None and waiting not in struck:
                send([waiting], signal.SIGCONT)
            if cell.cause is Cause.PAUSE:
                try:
                    await asyncio.sleep(PAUSE_S)
                finally:
                    send(struck, signal.SIGCONT)

    def _is_gathered(self, url: str) -> bool:
        return self._cluster.host_of(url) == SECOND

    def _cut(self, cell: Cell) -> None:
        name = {Target.ROUTER: ROUTER, Target.HOST: SECOND}.get(cell.target, FIRST)
        others = [n for n in (ROUTER, *INSTANCES) if n != name]
        both = cell.cause is Cause.BOTH_WAYS
        fro = both or away(cell)
        self._cluster.hosts.cut_off(name, others, to=both or not fro, fro=fro)

    def _note_router(self, trial: Trial) -> None:
        """Which process is the router now."""
        try:
            pid = self._cluster.router_process().pid
        except RunError:
            pid = 0
        if not trial.routers or trial.routers[-1][1] != pid:
            trial.routers.append((time.monotonic(), pid))


def lost_numbers(seen: Seen, before: Mapping[int, Mapping[str, Any]]) -> set[int]:
    """Instances that the router takes for lost, or has a successor of."""
    if seen.instances is None:
        return set()
    return {
        n
        for n, i in before.items()
        if (now := seen.instances.get(n)) is None
        or now.get("lost")
        or now["mode"] == "dead"
        or now["url"] != i["url"]
    }
