"""A router and its members in one event loop of virtual time, under weather of all kinds."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from unittest.mock import patch

from kunserve_sglang.control import control_plane, losses
from kunserve_sglang.control.control_plane import ControlPlane
from kunserve_sglang.control.coordinator import TransitionRunning
from kunserve_sglang.control.draining import Draining, NotDrained
from kunserve_sglang.control.saved_state import SavedState
from kunserve_sglang.core.cluster_config import ClusterConfig
from kunserve_sglang.policy.decision import NoPlan
from kunserve_sglang.policy.transition_request import (
    DropRequest,
    Outcome,
    RebalanceRequest,
    RestoreRequest,
    TransitionRequest,
)
from tests.support.model.calm import calm, picture
from tests.support.model.clock import VirtualLoop
from tests.support.model.member import PEER_TIMEOUT_S, ModelMember
from tests.support.model.network import ModelPlane, RouterLine, Weather

CALM_S = 150.0
"""Long enough for everything that is late, and for all who wait for it in vain."""

_TRIES = 10
_KINDS = {
    b"to ": (b"", b"prepare", b"commit", b"commit", b"abort", b"lost"),
    b"from ": (b"", b"vote", b"done", b"done", b"status"),
}
_LOOK_S = 0.25
"""The router looks less often, to save time that the test takes."""


class ModelCluster:
    """What happens in it follows from `seed`; `happened` counts what did."""

    def __init__(self, seed: int, *, kv_pages: int = 12) -> None:
        """`kv_pages` are those for a layer's KV, of which parameters have nine."""
        self.loop = VirtualLoop()
        self._chance = random.Random(seed)
        self._weather = Weather(self.loop, self._chance)
        self._planes: dict[int, ModelPlane] = {}
        self._line = RouterLine(self._weather)
        self._processes = 0
        self._kv_pages = kv_pages
        self.members: dict[int, ModelMember] = {}
        self.happened: Counter[str] = Counter()

    def run(self) -> Counter[str]:
        """One life of the cluster; raises `AssertionError` if it does not end well."""
        try:
            with (
                patch.object(control_plane, "WATCH_INTERVAL_S", _LOOK_S),
                patch.object(losses, "_POLL_INTERVAL_S", _LOOK_S),
            ):
                self.loop.run_until_complete(self._main())
        finally:
            for member in self.members.values():
                member.kill()
            self.loop.close()
        return self.happened

    def steps_without_a_commit(self) -> int:
        """Micro-batches within two seconds of a drop of which one member never hears."""

        async def main() -> int:
            self._size = 2
            for number in range(2):
                self._start_member(number)
            async with self._router(2):
                await asyncio.sleep(2.0)
                self._weather.cut(b"to instance-1", b"commit", 60.0)
                self._background(self._transition(DropRequest()))
                await self._until(lambda: self._grouped(), 10.0)
                member = self.members[1]
                before = member.engine.steps
                await asyncio.sleep(2.0)
                self.check()
                return member.engine.steps - before

        try:
            return self.loop.run_until_complete(main())
        finally:
            for member in self.members.values():
                member.kill()
            self.loop.close()

    # -- a life ----------------------------------------------------------------------------------

    async def _main(self) -> None:
        size = self._size = self._chance.randrange(2, 5)
        for number in range(size):
            self._start_member(number)
        async with self._router(size):
            await asyncio.sleep(2.0)
            self._weather.break_up()
            for _ in range(self._chance.randrange(4, 14)):
                self._event()
                await asyncio.sleep(self._chance.choice((0.0, 0.01, 0.2, 2.0, 6.0)))
            self._weather.clear_up()
            if self._chance.random() < 0.3:
                await self._stop_router()
                self.happened["router restarted"] += 1
                left = self.plane.saved() if self._chance.random() < 0.5 else None
                self._start_router(size, left)
            for member in self.members.values():
                member.serving = False
            await self._until(self._is_calm, CALM_S)
            await self._end_well()

    def _event(self) -> None:
        """Something that is asked for, or that goes wrong; the next one may overlap with it."""
        events = [self._ask] * 5 + [self._cut] * 4 + [self._stop_somebody, self._shift_load]
        if self._chance.random() < 0.1:
            events += [self._restart_somebody]
        self._chance.choice(events)()

    async def _end_well(self) -> None:
        """Every group can be restored, merged, shifted and left."""
        await self._must(RestoreRequest(), lambda: not self._grouped())
        await self._must(DropRequest(), lambda: bool(self._grouped()))
        self.happened["given up"] += sum(m.engine.errors > 0 for m in self.members.values())
        for member in self.members.values():
            member.engine.demand = 60 if member.number else 0
        await asyncio.sleep(2.0)
        await self._must(RebalanceRequest(), lambda: True)
        leaving = self._chance.choice(sorted(self.plane.registry.instances))
        await self._drain(leaving, tries=_TRIES)
        gone = self.members.pop(leaving)
        await self._until(lambda: gone.engine.ended, CALM_S)
        await self._must(RestoreRequest(), lambda: not self._grouped())
        await self._until(self._is_calm, CALM_S)
        self.check()

    async def _must(self, request: TransitionRequest, reached: Callable[[], bool]) -> None:
        """Ask until it is so; a plan is refused while something of the last one is under way."""
        said = ""
        for _ in range(_TRIES):
            said = await self._transition(request)
            await asyncio.sleep(2.0)
            if said in ("nothing to do", Outcome.COMMITTED) and reached():
                self.check()
                return
        raise AssertionError(f"{request.kind} is not possible: {said}")

    # -- what happens ----------------------------------------------------------------------------

    def _ask(self) -> None:
        known = range(self._size)
        pair = tuple(self._chance.sample(known, 2))
        requests: list[TransitionRequest] = [DropRequest(), DropRequest(instances=pair)]
        if self._grouped():
            requests += [RestoreRequest(), RestoreRequest(instances=pair[:1])]
            requests += [RestoreRequest(stages=2), RebalanceRequest(), RebalanceRequest()]
        self._background(self._transition(self._chance.choice(requests)))

    async def _transition(self, request: TransitionRequest) -> str:
        try:
            event = await self.plane.transition(request)
        except NoPlan:
            return "nothing to do"
        except TransitionRunning as error:
            return str(error)
        self.happened[f"{event.kind} {event.status}"] += 1
        return event.status if event.status is Outcome.COMMITTED else event.error

    def _shift_load(self) -> None:
        for member in self.members.values():
            member.engine.demand = self._chance.choice((0, 10, 60))

    def _stop_somebody(self) -> None:
        seconds = self._chance.choice((0.5, 3.0, 6.0, 12.0, 30.0))
        self._chance.choice(sorted(self.members.items()))[1].sleeper.stop(seconds)
        self.happened["stopped"] += 1

    def _cut(self) -> None:
        """For a while some messages get lost on their way to some members, or from them."""
        way = self._chance.choice((b"to ", b"from "))
        name = self._chance.choice((b"", f"instance-{self._chance.randrange(self._size)}".encode()))
        kind = self._chance.choice(_KINDS[way])
        self._weather.cut(way + name, kind, self._chance.choice((0.5, 2.0, 4.0, 5.0, 15.0, 40.0)))
        self.happened["cut"] += 1

    def _restart_somebody(self) -> None:
        """Its process dies, and another one comes under its number."""
        number = self._chance.choice(sorted(self.members))
        if len(self.members) < self._size:
            return  # one at a time
        self.members[number].kill()
        self._replace(number, self._chance.choice((0.5, 5.0, 20.0)))
        self.happened["restarted"] += 1

    def _replace(self, number: int, after_s: float) -> None:
        """It has died; the router finds out, and another one comes."""
        del self.members[number]
        self._line.hang_up(f"instance-{number}".encode())
        known = self.plane.registry.instances.get(number)
        if known is not None:
            known.liveness.serves()
            known.liveness.refuses()
        self.loop.call_later(after_s, self._start_member, number)

    async def _drain(self, number: int, tries: int) -> None:
        failure: Exception | None = None
        for _ in range(tries):
            try:
                instance = self.plane.registry.instances[number]
                await Draining(self.plane).drain(instance, 60.0)
            except (NotDrained, NoPlan, TransitionRunning) as error:
                failure = error
                await asyncio.sleep(2.0)
            else:
                await asyncio.sleep(1.0)
                self.happened["drained"] += 1
                return
        raise AssertionError(f"instance {number} cannot be drained: {failure}")

    def _start_member(self, number: int) -> None:
        self._processes += 1
        self.members[number] = ModelMember(
            number,
            self._processes,
            router=lambda: self._line,
            planes=self._planes,
            weather=self._weather,
            chance=self._chance,
            kv_pages=self._kv_pages,
        )

    @contextlib.asynccontextmanager
    async def _router(self, size: int) -> AsyncIterator[None]:
        self._tasks: set[asyncio.Task[object]] = set()
        self._start_router(size)
        try:
            yield
        finally:
            await self._stop_router()

    def _start_router(self, size: int, left: SavedState | None = None) -> None:
        """`left` is what the one before has left, if it can be read."""
        config = ClusterConfig(
            num_instances=size,
            vote_timeout_s=2.0,
            exchange_timeout_s=10.0,
            transfer_timeout_s=20.0,
            max_group_size=4,
        )
        self._line = RouterLine(self._weather)
        self.plane = ControlPlane(config, self._line, now=self.loop.time)
        if left is not None:
            self.plane.take_over(left)
        self.plane.controller.auto = False
        self._serving = asyncio.ensure_future(self.plane.run())

    async def _stop_router(self) -> None:
        """It dies in the middle of whatever it does."""
        for task in (*self._tasks, self._serving):
            task.cancel()
        await asyncio.gather(*self._tasks, self._serving, return_exceptions=True)

    def _background(self, work: Coroutine[None, None, object]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def check(self) -> None:
        """Nobody has failed, and each member runs by a layout that all in it run by."""
        for number, member in self.members.items():
            if member.sleeper.failure is not None:
                raise AssertionError(f"instance {number} has failed") from member.sleeper.failure
        if self._serving.done():
            raise AssertionError("the router has failed") from self._serving.exception()

    def _is_calm(self) -> bool:
        return calm(self.plane, self.members)

    def _grouped(self) -> bool:
        return any(m.agent.status().layout.cooperative for m in self.members.values())

    async def _until(self, condition: Callable[[], bool], seconds: float) -> None:
        deadline = self.loop.time() + seconds
        while not condition():
            self.check()
            if self.loop.time() > deadline:
                raise AssertionError(f"after {seconds:g} s still {picture(self.members)}")
            await asyncio.sleep(0.5)
        self.check()


assert CALM_S > 4 * PEER_TIMEOUT_S
