"""A cluster of scripted members and the product's control plane, for in-process speed."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing as mp
import os
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec

from kunserve_sglang.api.events import Event
from kunserve_sglang.control.control_plane import ControlPlane
from kunserve_sglang.control.coordinator import TransitionRunning
from kunserve_sglang.core.messages import TransitionKind, to_json_types
from kunserve_sglang.core.processes import free_port
from kunserve_sglang.core.settings import (
    ClusterConfig,
    DispatchPolicy,
    ExchangeMode,
    InstanceConfig,
    Transport,
)
from kunserve_sglang.policy.planner import Plan
from kunserve_sglang.policy.staging import staged
from kunserve_sglang.policy.transition_request import REQUEST_TYPES, Outcome, RestoreRequest
from kunserve_sglang.router.proxy.traffic import Traffic
from tests.support.member import Action, Gate, Output, serve
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
        self.plane = ControlPlane(config, address)
        self.traffic = self.plane.front = Traffic(self.plane.registry, config)
        self.plane.controller.auto = False
        self._task = asyncio.ensure_future(self.plane.run())
        self._ready.set()
        try:
            await self._task
        except asyncio.CancelledError:
            self.plane.close()


class ScriptedCluster:
    """`size` members of `ranks` processes each; use as a context manager."""

    def __init__(
        self,
        folder: Path,
        size: int,
        *,
        memory_budget: int,
        page_bytes: int,
        vote_timeout_s: float = 20.0,
        exchange: ExchangeMode = ExchangeMode.COORDINATED,
        dispatch: DispatchPolicy = DispatchPolicy.LEAST_LOAD,
        transport: Transport = Transport.AUTO,
        ranks: int = 1,
        **server: Any,
    ) -> None:
        config = ClusterConfig(
            num_instances=size,
            vote_timeout_s=vote_timeout_s,
            exchange=exchange,
            dispatch=dispatch,
        )
        self.control = ControlThread(config, f"ipc://{folder}/control")
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["tests.support.member"])
        self._links: list[Connection] = []
        self._killed: set[int] = set()
        self._processes: list[list[Any]] = []
        server = {**server, "tp_size": ranks}
        for number in range(size):
            instance = InstanceConfig(
                instance=number,
                url=f"scripted://{number}",
                control_address=f"ipc://{folder}/control",
                data_socket=f"{folder}/data-{number}",
                memory_budget=memory_budget,
                owners=size,
                page_bytes=page_bytes,
                peer_timeout_s=30.0,
                transport=transport,
            )
            ours, theirs = context.Pipe()
            # Ranks of one instance meet at a port.
            at = {**server, "nccl_port": free_port()}
            members = [
                context.Process(
                    target=serve, args=(None if rank else theirs, instance, at, rank), daemon=True
                )
                for rank in range(ranks)
            ]
            for process in members:
                process.start()
            theirs.close()
            self._links.append(ours)
            self._processes.append(members)
        self.capacities = [self._expect(link, "ready") for link in self._links]
        self._wait_for_status(size)

    def __enter__(self) -> ScriptedCluster:
        return self

    def __exit__(self, *_: object) -> None:
        for link in self._links:
            with contextlib.suppress(BrokenPipeError):
                link.send(("stop", None))
        for process in (p for members in self._processes for p in members):
            process.join(30)
            if process.is_alive():
                process.kill()
        self.control.stop()

    def play(
        self,
        scripts: list[list[tuple[int, Action]]],
        at_gate: Callable[[str], None] | None = None,
    ) -> list[dict[str, Output]]:
        """Play one script a member. When all stand at a gate, `at_gate` is called with its name.

        A member that has been killed plays nothing.
        """
        if at_gate is None:
            scripts = [[x for x in s if not isinstance(x[1], Gate)] for s in scripts]
        for link, script in zip(self._links, scripts, strict=True):
            with contextlib.suppress(BrokenPipeError):
                link.send(("play", script))
        results: dict[int, dict[str, Output]] = {}
        waiting: dict[int, str] = {}
        while len(results) < len(self._links):
            for number, link in enumerate(self._links):
                if number in results or not link.poll(0.01):
                    continue
                try:
                    verb, value = link.recv()
                except EOFError:
                    assert number in self._killed, f"member {number} has ended by itself"
                    verb, value = "played", {}
                if verb == "gate":
                    waiting[number] = value
                else:
                    results[number] = value
            if len(waiting) == len(self._links) and at_gate is not None:
                assert len(set(waiting.values())) == 1, waiting
                at_gate(waiting[0])
                waiting.clear()
                for link in self._links:
                    with contextlib.suppress(BrokenPipeError):
                        link.send("open")
        return [results[number] for number in range(len(self._links))]

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

        async def work(plane: ControlPlane) -> dict[int, int]:
            plane.set_policy(auto, thresholds)
            return await plane.room.tell()

        told = self.control.call(work)
        known = self.control.plane.registry.instances

        def reported() -> bool:
            loads = {n: i.status.load for n, i in known.items() if i.status is not None}
            return all(n in loads and loads[n].attainable == told[n] for n in told)

        until(reported, READY_S, poll_s=0.01, about=lambda: f"{told} was not heard")

    def restore_when_idle(self) -> None:
        """Make all members independent, once the router knows that their requests have ended."""
        self.wait_until(lambda instances: all(i["slots"]["used"] == 0 for i in instances))
        assert self.transition(TransitionKind.RESTORE).status is Outcome.COMMITTED

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

    @contextmanager
    def pieces_held(self) -> Iterator[None]:
        """Nothing moves between members but what micro-batches take along."""
        self._hold_pieces(True)
        try:
            yield
        finally:
            self._hold_pieces(False)

    def _hold_pieces(self, hold: bool) -> None:
        for link, members in zip(self._links, self._processes, strict=True):
            if members[0].is_alive():
                link.send(("hold", hold))
                self._expect(link, "held")

    @contextmanager
    def stopped(self, member: int) -> Iterator[None]:
        """The member does nothing at all, as a process that swaps or a host that hangs."""
        pids = [process.pid for process in self._processes[member]]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)

    def kill(self, member: int) -> None:
        """The member is gone, as after `kill -9`; its HTTP server, which it has not, refuses."""
        self._killed.add(member)
        for process in self._processes[member]:
            process.kill()
        for process in self._processes[member]:
            process.join(30)
        self.refuse_http(member)

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
        instances: list[dict[str, Any]] = to_json_types(self.control.plane.status().instances)
        return instances

    def numbers(self, member: int) -> tuple[int, int]:
        """Largest slot ever written, and requests retracted."""
        self._links[member].send(("numbers", None))
        numbers: tuple[int, int] = self._expect(self._links[member], "numbers")
        return numbers

    def cached(self, member: int) -> set[int]:
        """The blocks of all sequences in its radix tree."""
        self._links[member].send(("cached", None))
        cached: set[int] = self._expect(self._links[member], "cached")
        return cached

    def waits(self, member: int) -> dict[str, int]:
        """Where it has waited for its emulated device since the last call, and how often."""
        self._links[member].send(("waits", None))
        waits: dict[str, int] = self._expect(self._links[member], "waits")
        return waits

    def _expect(self, link: Connection, verb: str) -> Any:
        if not link.poll(READY_S):
            raise TimeoutError(f"no {verb} from a member")
        got, value = link.recv()
        assert got == verb
        return value

    def _wait_for_status(self, size: int) -> None:
        known = self.control.plane.registry.instances

        def reported() -> bool:
            return sum(i.status is not None for i in known.values()) == size

        until(reported, READY_S, poll_s=0.01, about=lambda: "members did not report")
