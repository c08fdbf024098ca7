"""The control plane as one object: what the HTTP side and the tests talk to."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection
from typing import Any

import msgspec

from kunserve_sglang.api.events import Event, Outcome
from kunserve_sglang.api.types import ClusterStatus, Policy
from kunserve_sglang.control.coordinator import Coordinator, TransitionRunning
from kunserve_sglang.control.descriptions import status_of
from kunserve_sglang.control.events import EventLog, declined
from kunserve_sglang.control.front import Front, NoFront
from kunserve_sglang.control.hub import ControlHub
from kunserve_sglang.control.losses import Losses
from kunserve_sglang.control.registry import Instance, Registry
from kunserve_sglang.core.keys import ClusterKeys
from kunserve_sglang.core.messages import (
    PROTOCOL_VERSION,
    CacheReport,
    Hello,
    Leave,
    Status,
    TransitionKind,
    Welcome,
)
from kunserve_sglang.core.settings import ClusterConfig, ExchangeMode, OverloadPolicy
from kunserve_sglang.policy.decision import Decision
from kunserve_sglang.policy.monitor import DropNeeded, Need, OverloadMonitor
from kunserve_sglang.policy.planner import NoPlan, Plan, plan_drop, plan_restore
from kunserve_sglang.policy.queueing import with_held
from kunserve_sglang.policy.shares import SkewedGroup, plan_rebalance
from kunserve_sglang.policy.staging import staged
from kunserve_sglang.policy.state import ClusterState
from kunserve_sglang.policy.thresholds import Thresholds

logger = logging.getLogger(__name__)

_WATCH_INTERVAL_S = 0.05
_RETRY_S = 1.0
"""Pause after a plan that could not be made or was refused, before the monitor tries again."""


class ControlPlane:
    """Registry, monitor, planner and coordinator, wired together.

    `auto` says whether the monitor acts by itself; plans asked for by hand always run. `front` is
    to be set, before `run`, by whoever brings requests to the instances.
    """

    def __init__(
        self, config: ClusterConfig, address: str, keys: ClusterKeys | None = None
    ) -> None:
        """`address` is the control socket for this host; that for others needs `keys`."""
        self.config = config
        self.registry = Registry(config.num_instances)
        self.events = EventLog()
        self.front: Front = NoFront()
        self.hub = ControlHub(address, tcp=config.control_address, keys=keys)
        self.coordinator = Coordinator(self.hub, config, self.events)
        self.losses = Losses(self.registry, self.hub, self.coordinator)
        self.monitor = OverloadMonitor(
            Thresholds(drop=config.drop_threshold, restore=config.restore_threshold)
        )
        self.auto = config.overload_policy is OverloadPolicy.DROP
        self._retry_after = 0.0

    async def run(self) -> None:
        """Serve the control socket and watch the load until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.hub.run(self._on_hello, self._on_status, self._on_cache))
            tasks.create_task(self.hub.watch_ends(self.registry.suspect))
            tasks.create_task(self.losses.run())
            tasks.create_task(self._watch())

    def close(self) -> None:
        self.hub.close()

    def state(self) -> ClusterState:
        """The cluster for the policies; what the router holds back counts as waiting."""
        plain = sum(i.capacity for i in self.registry.available() if i.plain)
        return with_held(self.registry.snapshot(), self.front.held(), plain)

    def plan(
        self,
        kind: TransitionKind,
        *,
        instances: Collection[int] | None = None,
        tokens: int | None = None,
        stages: int = 1,
        reason: str = "asked for",
        epoch: int | None = None,
    ) -> Plan:
        """What a transition would do now; changes nothing. Raises `NoPlan`.

        `tokens` are for a drop, `stages` for a restore: see `policy.planner`.
        """
        state = self.state()
        epoch = self.registry.latest_epoch + 1 if epoch is None else epoch
        if kind is TransitionKind.RESTORE:
            return plan_restore(
                state, epoch=epoch, reason=reason, instances=instances, stages=stages
            )
        if kind is TransitionKind.REBALANCE:
            return plan_rebalance(state, epoch=epoch, reason=reason, instances=instances)
        return plan_drop(
            state,
            epoch=epoch,
            reason=reason,
            max_group_size=self.config.max_group_size,
            instances=instances,
            tokens=tokens,
            tpot_limit_ms=self.config.tpot_limit_ms,
        )

    async def transition(
        self,
        kind: TransitionKind,
        *,
        instances: Collection[int] | None = None,
        tokens: int | None = None,
        stages: int = 1,
        reason: str = "asked for",
    ) -> Event:
        """Run a drop, restore or rebalance to its end. Raises `NoPlan` or `TransitionRunning`."""

        def plan(epoch: int) -> Plan:
            return self.plan(
                kind,
                instances=instances,
                tokens=tokens,
                stages=stages,
                reason=reason,
                epoch=epoch,
            )

        return await self._carry_out(plan, self._unwanted)

    async def split(self, instance: int) -> Event:
        """Take the group of a draining instance apart, whatever the load.

        Raises `NoPlan` or `TransitionRunning`.
        """

        def plan(epoch: int) -> Plan:
            state = self.registry.snapshot(draining=True)
            reason = f"instance {instance} leaves"
            return plan_restore(state, epoch=epoch, reason=reason, instances=[instance])

        return await self._carry_out(plan, lambda _: "")

    async def let_go(self, instance: Instance) -> None:
        """It has nothing left to do: tell it to end, if we can, and forget it."""
        self.registry.forget(instance)
        if not instance.plain:
            await self.hub.tell(instance.number, Leave(reason="drained"))

    async def _carry_out(
        self, plan: Callable[[int], Plan], unwanted: Callable[[Plan], str]
    ) -> Event:
        """Make the plan, for the epoch that it gets, and run it in steps."""

        def in_steps() -> Plan:
            made = plan(self.coordinator.next_epoch(self.registry.latest_epoch))
            if self.config.exchange is ExchangeMode.STOP:
                return made
            return staged(made, self.registry.snapshot(draining=True))

        event = await self.coordinator.execute(in_steps, unwanted)
        if event.status is not Outcome.ABORTED:
            self.monitor.transition_ended(time.monotonic(), event.kind)
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

    def _unwanted(self, plan: Plan) -> str:
        """Why a restore that has begun should be given up: its slots are needed after all."""
        if not self.auto:
            return ""
        state = self.state()
        short = [
            s.instance
            for s in state.instances
            if s.instance in plan.instances and self.monitor.short(s)
        ]
        return f"requests wait for slots on instances {short} again" if short else ""

    def policy(self) -> Policy:
        return Policy(auto=self.auto, **msgspec.structs.asdict(self.monitor.thresholds))

    def set_policy(self, auto: bool | None, thresholds: dict[str, float]) -> None:
        """Change what was given, keep the rest; values are checked by the caller."""
        if auto is not None:
            self.auto = auto
        self.monitor.thresholds = msgspec.structs.replace(self.monitor.thresholds, **thresholds)

    def status(self) -> ClusterStatus:
        """The body of `GET /kunserve/status`."""
        return ClusterStatus(
            epoch=self.registry.latest_epoch,
            policy=self.policy(),
            transition=self.coordinator.running,
            latency=self.front.latency_summary(),
            queue=self.front.queue_status(),
            instances=[status_of(i) for _, i in sorted(self.registry.instances.items())],
        )

    def _on_hello(self, hello: Hello) -> Welcome | Leave:
        known = hello.instance in self.registry.instances
        if not self.registry.hello(hello):
            return Leave(reason="drained")
        if not known:
            logger.info(
                "instance %d at %s: %d token slots", hello.instance, hello.url, hello.capacity
            )
        instance = self.registry.instances[hello.instance]
        return Welcome(version=PROTOCOL_VERSION, report_cache=self.front.wants_cache(instance))

    def _on_status(self, status: Status) -> None:
        self.registry.status(status)
        self.front.room_changed()  # it may be running more than before, and so take more

    def _on_cache(self, report: CacheReport) -> None:
        instance = self.registry.instances.get(report.instance)
        if instance is not None:
            self.front.cache_reported(instance, report)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_WATCH_INTERVAL_S)
            self.registry.mark_silent()
            self.front.room_changed()  # an instance may have come, or come back
            self.front.known(self.registry.instances)
            now = time.monotonic()
            need = self.monitor.observe(now, self.state())
            if need is None or now < self._retry_after or not self._may_act_on(need):
                continue
            try:
                event = await self.transition(**_wanted(need), reason=need.reason)
                if event.status is not Outcome.COMMITTED:
                    self._retry_after = time.monotonic() + _RETRY_S
            except (NoPlan, TransitionRunning) as error:
                # Nothing to merge any more, or a transition asked for by hand: look again later.
                logger.debug("%s: %s", need.reason, error)
                self._retry_after = time.monotonic() + _RETRY_S
                if isinstance(error, NoPlan) and error.decision is not None:
                    self._declined(need.reason, str(error), error.decision)

    def _declined(self, reason: str, error: str, decision: Decision) -> None:
        """Requests queue instead. Once is enough, for as long as nothing else happens."""
        latest = self.events.latest(1)
        if latest and latest[0].status is Outcome.DECLINED:
            return
        state = self.registry.snapshot()
        logger.warning("%s: %s", reason, error)
        epoch = self.coordinator.next_epoch(self.registry.latest_epoch)
        self.events.add(declined(epoch, reason, state, error, decision))

    def _may_act_on(self, need: Need) -> bool:
        """A group is one pool whoever made it; parameters go and come by policy only."""
        return self.auto or isinstance(need, SkewedGroup)


def _wanted(need: Need) -> dict[str, Any]:
    """What to ask `ControlPlane.transition` for."""
    if isinstance(need, DropNeeded):
        return {"kind": TransitionKind.DROP, "tokens": need.tokens}
    if isinstance(need, SkewedGroup):
        return {"kind": TransitionKind.REBALANCE, "instances": need.instances}
    return {
        "kind": TransitionKind.RESTORE,
        "instances": need.instances,
        "stages": need.stages,
    }
