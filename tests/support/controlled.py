"""The product's control plane on a thread of its own, and what tests ask of it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import msgspec

from kunserve_sglang.api.events import Event
from kunserve_sglang.control.control_plane import ControlPlane
from kunserve_sglang.control.control_socket import ControlSocket
from kunserve_sglang.control.coordinator import TransitionRunning
from kunserve_sglang.core.cluster_config import ClusterConfig
from kunserve_sglang.core.messages import Attainable, TransitionKind
from kunserve_sglang.policy.planner import Plan
from kunserve_sglang.policy.staging import staged
from kunserve_sglang.policy.transition_request import REQUEST_TYPES, Outcome, RestoreRequest
from kunserve_sglang.router.proxy.traffic import Traffic
from tests.support.waiting import until

READY_S = 120.0


class ControlThread:
    """The product's control plane on an event loop of its own."""

    def __init__(self, config: ClusterConfig, address: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(config, address), daemon=True)
        self._thread.start()
        assert self._ready.wait(30)

    def begin(self, work: Callable[[ControlPlane], Coroutine[Any, Any, Any]]) -> Future[Any]:
        """Run a coroutine there."""
        return asyncio.run_coroutine_threadsafe(work(self.plane), self._loop)

    def call(self, work: Callable[[ControlPlane], Coroutine[Any, Any, Any]]) -> Any:
        """Run a coroutine there and wait for it."""
        return self.begin(work).result(READY_S)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(30)
        assert not self._thread.is_alive()

    def _serve(self, config: ClusterConfig, address: str) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._main(config, address))

    async def _main(self, config: ClusterConfig, address: str) -> None:
        self.plane = ControlPlane(config, ControlSocket(address))
        self.traffic = self.plane.front = Traffic(self.plane.registry, config)
        self.plane.controller.auto = False
        self._task = asyncio.ensure_future(self.plane.run())
        self._ready.set()
        try:
            await self._task
        except asyncio.CancelledError:
            self.plane.close()


class Controlled:
    """Members that a control plane knows, whatever they are."""

    def __init__(self, control: ControlThread) -> None:
        self.control = control

    def transition(self, kind: TransitionKind, instances: list[int] | None = None) -> Event:
        """Run a transition to its end; returns the event record."""
        return self.begin(kind, instances).result(READY_S)

    def begin(
        self, kind: TransitionKind, instances: list[int] | None = None, stages: int = 1
    ) -> Future[Event]:
        """Start a transition, as soon as none runs that shares slots anew."""

        named = None if instances is None else tuple(instances)
        request = REQUEST_TYPES[kind](instances=named)
        if isinstance(request, RestoreRequest):
            request = msgspec.structs.replace(request, stages=stages)

        async def work(plane: ControlPlane) -> Event:
            async with asyncio.timeout(READY_S):
                while True:
                    try:
                        return await plane.transition(request)
                    except TransitionRunning:
                        await asyncio.sleep(0.01)

        return self.control.begin(work)

    @contextmanager
    def dropped(self) -> Iterator[None]:
        """All members in one group, and independent again afterwards, whatever happens."""
        assert self.transition(TransitionKind.DROP).status is Outcome.COMMITTED
        try:
            yield
        finally:
            self.restore_when_idle()

    @contextmanager
    def policy_on(self, *, drops: bool = True) -> Iterator[None]:
        """The cluster may drop by itself; without `drops` it never sees a reason to."""
        plane = self.control.plane
        before = plane.policy()
        self.set_policy(True, {} if drops else {"drop": 1e9})
        try:
            yield
        finally:
            self.set_policy(False, {"drop": before.drop})

    def set_policy(self, auto: bool, thresholds: dict[str, float]) -> None:
        """Returns once all instances have been told what follows for large requests."""
        self.change(lambda plane: plane.set_policy(auto, thresholds))

    def set_tpot_limit(self, limit_ms: float | None) -> None:
        """Groups whose tokens would take longer are not made. Returns as `set_policy` does."""

        def change(plane: ControlPlane) -> None:
            controller = plane.controller
            config = msgspec.structs.replace(controller._config, tpot_limit_ms=limit_ms)
            controller._config = config

        self.change(change)

    def set_draining(self, member: int, *, draining: bool) -> None:
        """Others have to do without it. Returns as `set_policy` does."""

        def change(plane: ControlPlane) -> None:
            plane.registry.instances[member].draining = draining

        self.change(change)

    def change(self, change: Callable[[ControlPlane], None]) -> None:
        """Returns once all instances have been told what follows for large requests."""

        async def work(plane: ControlPlane) -> dict[int, Attainable]:
            change(plane)
            return await plane.room.tell()

        told = self.control.call(work)
        known = self.control.plane.registry.instances

        def reported() -> bool:
            loads = {n: i.status.load for n, i in known.items() if i.status is not None}
            return all(n in loads and loads[n].attainable == told[n].slots for n in told)

        until(reported, READY_S, poll_s=0.01, about=lambda: f"{told} was not heard")

    def restore_when_idle(self) -> Event:
        """Make all members independent, once the router knows that their requests have ended."""
        self.wait_until(lambda instances: all(i["slots"]["used"] == 0 for i in instances), READY_S)
        event = self.transition(TransitionKind.RESTORE)
        assert event.status is Outcome.COMMITTED, event
        return event

    def transition_with_epoch(self, kind: TransitionKind, epoch: int) -> Event:
        """Run a plan that claims an epoch of its own."""

        async def work(plane: ControlPlane) -> Event:
            request = REQUEST_TYPES[kind]()
            return await plane.coordinator.execute(
                lambda: plane.controller.plan(request, plane.state(), epoch)
            )

        event: Event = self.control.call(work)
        return event

    def begin_restore(self, unwanted: Callable[[], str]) -> Future[Event]:
        """Start to restore all; given up as soon as `unwanted` has a reason."""

        async def work(plane: ControlPlane) -> Event:
            def make_plan() -> Plan:
                epoch = plane.coordinator.next_epoch(plane.status().epoch)
                plan = plane.controller.plan(RestoreRequest(), plane.state(), epoch)
                return staged(plan, plane.registry.snapshot())

            return await plane.coordinator.execute(make_plan, lambda _: unwanted())

        return self.control.begin(work)

    def refuse_http(self, member: int) -> None:
        """What the router finds out when it asks there."""

        async def work(plane: ControlPlane) -> None:
            liveness = plane.registry.instances[member].liveness
            liveness.serves()  # a port that was never open refuses nothing
            liveness.refuses()

        self.control.call(work)

    def wait_for_modes(self, modes: set[str]) -> None:
        self.wait_until(lambda instances: {i["mode"] for i in instances} == modes)

    def wait_until(self, true: Callable[[list[dict[str, Any]]], bool], timeout: float = 20) -> None:
        """Until what the router knows of the instances is as wanted."""
        until(lambda: true(self.status()), timeout, poll_s=0.01, about=self.status)

    def status(self) -> list[dict[str, Any]]:
        instances: list[dict[str, Any]] = msgspec.to_builtins(self.control.plane.status().instances)
        return instances

    def wait_for_reports(self, size: int) -> None:
        known = self.control.plane.registry.instances

        def reported() -> bool:
            return sum(i.status is not None for i in known.values()) == size

        until(reported, READY_S, poll_s=0.01, about=lambda: "members did not report")
