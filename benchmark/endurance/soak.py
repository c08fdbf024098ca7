"""One cluster, a crowd of clients, and one thing after the other that happens to them."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmark.endurance.books import imbalances, leftovers
from benchmark.endurance.census import Census
from benchmark.endurance.crowd import Crowd
from benchmark.endurance.happenings import Happening, happenings
from benchmark.experiment import RunError
from benchmark.faults.cells import Transition
from benchmark.faults.cluster import SECOND, FaultedCluster
from benchmark.faults.processes import send
from benchmark.faults.readiness import begin
from benchmark.faults.recovery import all_there, until_well
from benchmark.faults.trial import lost_numbers
from benchmark.faults.watch import Admin, Seen

_SAMPLE_S = 5.0
_LOOK_S = 0.25
_SETTLED_S = 120.0
_WELL_S = 240.0
_KEPT_LINES = 20


@dataclass(slots=True)
class Story:
    """What was done and seen: `done` are times of the census, what, and what came of it."""

    done: list[tuple[float, str, str]] = field(default_factory=list)
    imbalances: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    looks: int = 0
    slowest_return_s: float = 0.0
    """After a death or a renewal, until all instances served again."""


class Soak:
    """Lets a cluster live through it; the crowd asks meanwhile."""

    def __init__(
        self,
        cluster: FaultedCluster,
        admin: Admin,
        crowd: Crowd,
        census: Census,
        say: Callable[[str], None],
    ) -> None:
        self._cluster = cluster
        self._admin = admin
        self._crowd = crowd
        self.census = census
        self._say = say
        self.story = Story()

    async def run(self, seconds: float, chance: random.Random) -> None:
        """Returns when all is as it was before. Raises `RunError` if that does not come about."""
        began = self.census.now()
        async with asyncio.TaskGroup() as tasks:
            looking = [tasks.create_task(look) for look in (self._watch(), self._count())]
            changes = []
            async with self._crowd.asking():
                for at, kind in happenings(seconds, chance):
                    await asyncio.sleep(max(0.0, began + at - self.census.now()))
                    if kind.needs_all:
                        await self._settled(kind)
                        await self._strike(kind, chance)
                    else:
                        changes.append(tasks.create_task(self._change()))
                await self._settled("the end")
            await asyncio.gather(*changes)
            for task in looking:
                task.cancel()
        await until_well(self._cluster, self._admin, _WELL_S)
        seen = await self._admin.seen()
        self.story.leftovers = leftovers(seen.instances or {})

    # -- what happens ----------------------------------------------------------------------------

    async def _change(self) -> None:
        """Groups come apart, or else all instances become one; that this is refused is no fault."""
        seen = await self._admin.seen()
        known = seen.instances or {}
        grouped = any(i["mode"] == "cooperative" for i in known.values())
        kind = Transition.RESTORE if grouped else Transition.DROP
        code, event = await begin(self._admin, kind, known)
        self._done(kind, event["status"] if code == 200 else f"refused ({code})")

    async def _strike(self, kind: Happening, chance: random.Random) -> None:
        began = time.monotonic()
        before = (await self._admin.seen()).instances or {}
        match kind:
            case Happening.KILL_ROUTER:
                send([self._cluster.router_process()], signal.SIGKILL)
            case Happening.KILL_INSTANCE:
                urls = await self._urls_of(SECOND)
                send(self._cluster.instance(SECOND, chance.choice(urls)), signal.SIGKILL)
            case Happening.RENEW:
                await asyncio.to_thread(self._cluster.renew, SECOND)
        if kind is not Happening.KILL_ROUTER:  # which is noticed by whoever looks
            await self._until(kind, lambda seen: bool(lost_numbers(seen, before)))
        await self._settled(kind)
        took = time.monotonic() - began
        self.story.slowest_return_s = max(self.story.slowest_return_s, took)
        self._done(kind, f"{took:.1f} s")

    async def _urls_of(self, host: str) -> list[str]:
        seen = await self._admin.seen()
        urls = [str(i["url"]) for i in (seen.instances or {}).values()]
        return [url for url in sorted(urls) if self._cluster.host_of(url) == host]

    async def _settled(self, why: object) -> None:
        """Until all are there, and whatever began has ended. Raises `RunError`."""
        await self._until(why, _is_settled)

    async def _until(self, why: object, is_so: Callable[[Seen], bool]) -> None:
        deadline = time.monotonic() + _SETTLED_S
        while not is_so(seen := await self._admin.seen()):
            if time.monotonic() > deadline:
                raise RunError(f"{why}: still to be waited for after {_SETTLED_S:g} s: {seen}")
            await asyncio.sleep(_LOOK_S)

    def _done(self, kind: str, what: str) -> None:
        at = round(self.census.now(), 2)
        self.story.done.append((at, kind, what))
        self._say(f"{at:7.1f} s: {kind}: {what}; requests: {dict(self._crowd.verdicts)}")

    # -- what is seen ----------------------------------------------------------------------------

    async def _watch(self) -> None:
        story = self.story
        while True:
            seen = await self._admin.seen()
            if seen.instances is not None:
                story.looks += 1
                found = imbalances(seen.instances)
                story.imbalances += found[: _KEPT_LINES - len(story.imbalances)]
            await asyncio.sleep(_LOOK_S)

    async def _count(self) -> None:
        while True:
            await asyncio.to_thread(self.census.take)
            await asyncio.sleep(_SAMPLE_S)


def _is_settled(seen: Seen) -> bool:
    modes = {i["mode"] for i in (seen.instances or {}).values()}
    return all_there(seen) and modes <= {"independent", "cooperative"}
