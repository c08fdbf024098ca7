"""The control plane as one object: what the HTTP side and the tests talk to."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import msgspec

from kunserve_sglang.api.events import Event
from kunserve_sglang.api.service import ServiceStatus
from kunserve_sglang.api.types import ClusterStatus, Policy
from kunserve_sglang.control.control_socket import ControlLine
from kunserve_sglang.control.coordinator import Coordinator, TransitionRunning
from kunserve_sglang.control.descriptions import status_of
from kunserve_sglang.control.events import EventLog, declined
from kunserve_sglang.control.front import Front, NoFront
from kunserve_sglang.control.history import SAMPLE_INTERVAL_S, HistoryLog
from kunserve_sglang.control.hub import ControlHub
from kunserve_sglang.control.losses import Losses
from kunserve_sglang.control.plausible import check_hello, check_status
from kunserve_sglang.control.registry import Instance, Registry
from kunserve_sglang.control.room import Room
from kunserve_sglang.control.saved_state import SavedState, state_to_save, take_over
from kunserve_sglang.core.cluster_config import ClusterConfig
from kunserve_sglang.core.errors import InternalError
from kunserve_sglang.core.identity import ModelIdentity
from kunserve_sglang.core.messages import (
    PROTOCOL_VERSION,
    CacheReport,
    Greet,
    Hello,
    Leave,
    Status,
    Welcome,
)
from kunserve_sglang.policy.controller import TELL_INTERVAL_S, WATCH_INTERVAL_S, Controller
from kunserve_sglang.policy.decision import Decision, NoPlan
from kunserve_sglang.policy.planner import Plan
from kunserve_sglang.policy.queueing import with_held
from kunserve_sglang.policy.state import ClusterState
from kunserve_sglang.policy.thresholds import Thresholds
from kunserve_sglang.policy.transition_request import RestoreRequest, TransitionRequest

logger = logging.getLogger(__name__)


class ControlPlane:
    """Registry, controller and coordinator, wired together.

    The controller asks for transitions by itself; those asked for by hand always run. `front` is
    to be set, before `run`, by whoever brings requests to the instances, and so is `on_gone`, which
    is told of instances that will not answer any more.
    """

    def __init__(
        self,
        config: ClusterConfig,
        line: ControlLine,
        model: ModelIdentity | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`line` leads to the instances; `model` is what those serve that the router starts with.

        `now` is the clock of everything that is waited for.
        """
        self.config = config
        self.registry = Registry(config.num_instances, model, now)
        self.events = EventLog()
        self.history = HistoryLog()
        self.front: Front = NoFront()
        self.on_gone: Callable[[Instance], None] = lambda _: None
        self.hub = ControlHub(line)
        self.coordinator = Coordinator(self.hub, config, self.events)
        self.losses = Losses(self.registry, self.hub, self.coordinator, self._gone)
        self.controller = Controller(config)
        self.room = Room(self.registry, self.hub, lambda: self.controller.admission(self._seen()))

    def saved(self) -> SavedState:
        """For a router that comes after this one."""
        return state_to_save(self.registry, self.policy(), self.coordinator.last_epoch)

    def take_over(self, saved: SavedState) -> None:
        """Go on where another router has ended; to be called before `run`."""
        take_over(self.registry, saved)
        self.coordinator.last_epoch = saved.last_epoch
        self.controller.auto = saved.policy.auto
        self.controller.thresholds = msgspec.convert(saved.policy, Thresholds, from_attributes=True)

    async def run(self) -> None:
        """Serve the control socket and watch the load until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.hub.run(self._on_hello, self._on_status, self._on_cache))
            tasks.create_task(self.hub.watch_ends(self.registry.suspect))
            tasks.create_task(self.losses.run())
            tasks.create_task(self.room.run())
            tasks.create_task(self._watch_instances())
            tasks.create_task(self._watch_load())
            tasks.create_task(self._tell_limits())
            tasks.create_task(self._keep_history())

    def close(self) -> None:
        self.coordinator.close()
        self.hub.close()

    def state(self) -> ClusterState:
        """The cluster for the policies; what the router holds back counts as waiting."""
        plain = sum(i.capacity for i in self.registry.available() if i.plain)
        front = self.front
        return with_held(self._seen(), front.held(), plain, front.short())

    def _seen(self) -> ClusterState:
        return msgspec.structs.replace(self.registry.snapshot(), wanted=self.front.wanted())

    def plan(self, request: TransitionRequest) -> Plan:
        """What the request would do now; changes nothing. Raises `NoPlan`."""
        return self.controller.plan(request, self.state(), self.registry.latest_epoch + 1)

    async def transition(self, request: TransitionRequest) -> Event:
        """Meet the request, to the end. Raises `NoPlan` or `TransitionRunning`."""
        return await self._carry_out(
            request, self.state, lambda plan: self.controller.unwanted(plan, self.state())
        )

    async def split(self, instance: int) -> Event:
        """Take the group of a draining instance apart, whatever the load.

        Raises `NoPlan` or `TransitionRunning`.
        """
        reason = f"instance {instance} leaves"
        request = RestoreRequest(instances=(instance,), reason=reason, urgent=True)
        return await self._carry_out(
            request, lambda: self.registry.snapshot(draining=True), lambda _: ""
        )

    async def let_go(self, instance: Instance) -> None:
        """It has nothing left to do: tell it to end, if we can, and forget it."""
        self.registry.forget(instance)
        if not instance.plain:
            await self.hub.tell(instance.number, Leave(reason="drained"))

    async def _carry_out(
        self,
        request: TransitionRequest,
        observe: Callable[[], ClusterState],
        unwanted: Callable[[Plan], str],
    ) -> Event:
        """Plan when it is the request's turn, run all steps, and tell the controller."""

        def in_steps() -> Plan:
            state = observe()
            epoch = self.coordinator.next_epoch(self.registry.latest_epoch)
            return self.controller.in_steps(self.controller.plan(request, state, epoch), state)

        event = await self.coordinator.execute(in_steps, unwanted)
        self.controller.ended(self.registry.now(), event.kind, event.status)
        logger.info(
            "%s %s: %s, %.0f ms, capacity %d -> %d%s",
            event.kind,
            event.instances,
            event.status,
            event.duration_ms,
            event.capacity_before,
            event.capacity_after,
            f" ({event.error})" if event.error else "",
        )
        return event

    def policy(self) -> Policy:
        thresholds = msgspec.structs.asdict(self.controller.thresholds)
        return Policy(auto=self.controller.auto, **thresholds)

    def set_policy(self, auto: bool | None, thresholds: dict[str, float]) -> None:
        """Change what was given, keep the rest; values are checked by the caller."""
        if auto is not None:
            self.controller.auto = auto
        self.controller.thresholds = msgspec.structs.replace(
            self.controller.thresholds, **thresholds
        )

    def _service(self) -> ServiceStatus | None:
        limits = self.controller.limits(self.registry.snapshot())
        if limits is None:
            return None
        slowness = self.controller.slowness
        return ServiceStatus(
            ttft_ms=limits.ttft_ms,
            tpot_ms=limits.tpot_ms,
            weighed=self.controller.weighs,
            slowness=slowness.alone,
            slowness_together=slowness.together,
            slowness_across=slowness.across,
        )

    def status(self) -> ClusterStatus:
        """The body of `GET /kunserve/status`."""
        return ClusterStatus(
            epoch=self.registry.latest_epoch,
            policy=self.policy(),
            service=self._service(),
            transition=self.coordinator.running,
            latency=self.front.latency_summary(),
            attainment=self.front.attainment_summary(),
            queue=self.front.queue_status(),
            instances=[status_of(i) for i in self.registry.instances.values()],
        )

    def _on_hello(self, hello: Hello) -> Welcome | Leave:
        check_hello(hello)
        known = hello.instance in self.registry.instances
        if not known and not self.registry.leases.admits(hello.instance):
            logger.warning("instance %d has to end: it serves another model", hello.instance)
            return Leave(reason="other model")
        if not self.registry.hello(hello):
            return Leave(reason="drained")
        if not known:
            logger.info(
                "instance %d at %s: %d token slots", hello.instance, hello.url, hello.capacity
            )
        instance = self.registry.instances[hello.instance]
        return Welcome(version=PROTOCOL_VERSION, report_cache=self.front.wants_cache(instance))

    def _on_status(self, status: Status) -> Greet | None:
        known = self.registry.instances.get(status.instance)
        if known is None or known.hello is None:
            return Greet()
        check_status(status, known.hello)
        self.registry.status(status)
        self.front.room_changed()  # it may be running more than before, and so take more
        return None if known.greeted else Greet()

    def _on_cache(self, report: CacheReport) -> None:
        instance = self.registry.instances.get(report.instance)
        if instance is not None:
            self.front.cache_reported(instance, report)

    def _gone(self, instance: Instance) -> None:
        """Nobody should wait for it: neither we nor those who have asked it for something."""
        self.hub.give_up(instance.number)
        self.on_gone(instance)

    async def _watch_instances(self) -> None:
        """Whatever else is under way: a transition may take minutes."""
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            self.registry.mark_silent()
            self.front.room_changed()  # an instance may have come, or come back
            self.front.known(self.registry.instances)

    async def _watch_load(self) -> None:
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            await self.look()

    async def _tell_limits(self) -> None:
        """They change with the instances that have measured what their steps cost."""
        while True:
            times = self.controller.times(self.registry.snapshot())
            self.front.decided_by(self.controller.level, times)
            await asyncio.sleep(TELL_INTERVAL_S)

    async def _keep_history(self) -> None:
        while True:
            self.history.add(self.registry.instances.values(), self.front.attainment_summary())
            await asyncio.sleep(SAMPLE_INTERVAL_S)

    async def look(self) -> None:
        """Look at the cluster once, and do what the controller asks for."""
        request = self.controller.decide(self.registry.now(), self.state())
        if request is None:
            return
        try:
            await self.transition(request)
        except (NoPlan, TransitionRunning) as error:
            # Nothing to merge any more, or a transition asked for by hand: look again later.
            logger.debug("%s: %s", request.reason, error)
            decision = self.controller.refused(self.registry.now(), error)
            if decision is not None:
                self._declined(request, str(error), decision)
        except Exception:
            # A plan that cannot be made must not end the router, which serves without it.
            logger.exception("%s, and no plan could be made", request.reason)
            self.controller.refused(self.registry.now(), InternalError("no plan could be made"))

    def _declined(self, request: TransitionRequest, error: str, decision: Decision) -> None:
        """Requests queue instead of a drop; a restore waits."""
        logger.warning("%s: %s", request.reason, error)
        epoch = self.coordinator.next_epoch(self.registry.latest_epoch)
        self.events.add(declined(epoch, request, self.registry.snapshot(), error, decision))
