"""A life of a modelled cluster in which one fault happens on purpose, wherever there is a point."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine

from kunserve_sglang.control.control_plane import ControlPlane
from kunserve_sglang.control.coordinator import TransitionRunning
from kunserve_sglang.core import faults
from kunserve_sglang.core.faults import Faults, InjectedFault
from kunserve_sglang.policy.decision import NoPlan
from kunserve_sglang.policy.planner import Plan
from kunserve_sglang.policy.staging import staged
from kunserve_sglang.policy.transition_request import (
    DropRequest,
    RebalanceRequest,
    RestoreRequest,
    TransitionRequest,
)
from tests.support.model.cluster import CALM_S, ModelCluster
from tests.support.model.member import ModelMember

_SIZE = 2
_KV_PAGES = 6
"""So few that a drop finds room for KV that is still on its way, and hands it out later."""
_CUT_S = 3.0
_RESTART_S = 5.0
_SEEN_S = 30.0
"""After so long whoever stands still for good is killed, and another one comes: as launchers do."""


class FaultedCluster(ModelCluster):
    """Goes through every transition there is, and through a loss; the fault hits it somewhere.

    Both members run the points of an instance, the first that reaches one suffers.
    """

    def __init__(self, seed: int, fault: InjectedFault) -> None:
        super().__init__(seed, kv_pages=_KV_PAGES)
        self._faults = Faults((fault,), self)
        self._there = asyncio.Event()
        self._there.set()

    def run_faulted(self) -> None:
        """Raises `AssertionError` if the fault does not happen, or the life does not end well."""
        faults.arm(self._faults)
        try:
            self.run()
        finally:
            faults.arm(None)

    # -- effects ---------------------------------------------------------------------------------

    def crash(self) -> None:
        self._end(_RESTART_S)

    def hang(self) -> None:
        self._end(_SEEN_S, silent=True)

    def delay(self, seconds: float) -> None:
        sleeper = next((m.sleeper for m in self.members.values() if m.sleeper.running), None)
        if sleeper is None:
            self.loop.now += seconds
        else:
            sleeper.stop(seconds)
            sleeper.sleep(seconds)

    def _end(self, seconds: float, *, silent: bool = False) -> None:
        """Whoever runs now never does anything again; `silent` is one whose connections stay."""
        number = next((n for n, m in self.members.items() if m.sleeper.running), None)
        if number is None:
            self._end_router(seconds)
            raise asyncio.CancelledError
        member = self.members[number]
        if silent:
            self.loop.call_later(seconds, self._kill_silent, number, member)
            member.sleeper.stop(CALM_S)
            member.sleeper.sleep(CALM_S)
        member.plane.close()
        self._replace(number, seconds)
        member.sleeper.end()

    def _kill_silent(self, number: int, member: ModelMember) -> None:
        if self.members.get(number) is member:
            member.kill()
            self._replace(number, _RESTART_S)

    def _end_router(self, seconds: float) -> None:
        """In the middle of whatever it does; what it has kept so far is there for the next one."""
        self._there.clear()
        left = self.plane.saved()
        self._serving.cancel()
        for task in self._tasks:
            task.cancel()
        self._line.members.clear()

        def again() -> None:
            self._there.set()
            self._start_router(_SIZE, left)

        self.loop.call_later(seconds, again)

    # -- a life ----------------------------------------------------------------------------------

    async def _main(self) -> None:
        self._size = _SIZE
        for number in range(_SIZE):
            self._start_member(number)
        async with self._router(_SIZE):
            await self._until(self._is_calm, CALM_S)
            await self._drop_and_restore()
            await self._refuse()
            await self._lose_a_member()
            assert self._faults.happened, "the point was not reached"
            for member in self.members.values():
                member.serving = False
            await self._until(self._is_calm, CALM_S)
            await self._end_well()

    async def _drop_and_restore(self) -> None:
        await self._must(DropRequest(), lambda: bool(self._grouped()))
        for number, member in self.members.items():
            member.engine.demand = 0 if number else 60
        await asyncio.sleep(2.0)
        await self._must(RebalanceRequest(), lambda: True)
        await self._must(RestoreRequest(), lambda: not self._grouped())

    async def _refuse(self) -> None:
        """A plan for which a vote does not come, and a restore that is given up."""
        await self._must(DropRequest(), lambda: bool(self._grouped()))
        self._weather.cut(b"from instance-1", b"vote", _CUT_S)
        await self._transition(RestoreRequest())
        await asyncio.sleep(_CUT_S)
        self._weather.cut(b"from ", b"done", _CUT_S)
        await self._asked(self._restore_in_vain())

    async def _lose_a_member(self) -> None:
        await self._until(self._is_calm, CALM_S)
        await self._must(DropRequest(), lambda: bool(self._grouped()))
        if 1 in self.members:
            self.members[1].kill()
            self._replace(1, _RESTART_S)
        await self._until(lambda: len(self.members) == _SIZE, CALM_S)
        await self._until(self._is_calm, CALM_S)

    async def _restore_in_vain(self) -> str:
        plane: ControlPlane = self.plane

        def make_plan() -> Plan:
            epoch = plane.coordinator.next_epoch(plane.status().epoch)
            plan = plane.controller.plan(RestoreRequest(), plane.state(), epoch)
            return staged(plan, plane.registry.snapshot())

        event = await plane.coordinator.execute(make_plan, lambda _: "demand is back")
        return event.error

    async def _transition(self, request: TransitionRequest) -> str:
        await self._there.wait()
        return await self._asked(super()._transition(request))

    async def _asked(self, work: Coroutine[None, None, str]) -> str:
        """What comes of it, in a router that may end meanwhile."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        await asyncio.wait({task})
        self._tasks.discard(task)
        try:
            return "the router has ended" if task.cancelled() else task.result()
        except (NoPlan, TransitionRunning) as error:
            return str(error)

    def check(self) -> None:
        if self._there.is_set():
            super().check()
