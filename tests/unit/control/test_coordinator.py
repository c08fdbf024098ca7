"""How transitions end on the router's side, with members that answer by a script."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from kunserve_sglang.api.events import Event
from kunserve_sglang.control.coordinator import Coordinator
from kunserve_sglang.control.events import EventLog
from kunserve_sglang.control.hub import NoAnswer
from kunserve_sglang.core.cluster_config import ClusterConfig
from kunserve_sglang.core.layout import Layout
from kunserve_sglang.core.messages import (
    Abort,
    Commit,
    Done,
    Prepare,
    Transition,
    TransitionKind,
    Vote,
)
from kunserve_sglang.policy.decision import Decision
from kunserve_sglang.policy.planner import Plan, plan_drop
from kunserve_sglang.policy.transition_request import Outcome
from tests.support.clusters import carried_out, cluster


class Members:
    """All of them, instead of the hub: they refuse epochs from `refused` on."""

    def __init__(self, refused: int) -> None:
        self._refused = refused

    def next_call(self) -> int:
        return 1

    async def call(self, instance: int, message: Any, timeout_s: float, **_: Any) -> Vote | Done:  # noqa: ARG002
        if isinstance(message, Prepare):
            epoch = message.transition.epoch
            return Vote(call=1, epoch=epoch, ok=epoch < self._refused, reason="not now")
        assert isinstance(message, Commit | Abort)
        return Done(call=1, epoch=message.epoch, ok=True)

    async def tell(self, instance: int, message: Any) -> bool:  # noqa: ARG002
        return True


def grown(layout: Layout, epoch: int) -> Layout:
    members = (msgspec.structs.replace(m, capacity=m.capacity + 1) for m in layout.members)
    return Layout(epoch=epoch, members=tuple(members))


def growth(group: Layout, epoch: int) -> Transition:
    return Transition(
        epoch=epoch,
        kind=TransitionKind.REBALANCE,
        before=(group,),
        after=(grown(group, epoch),),
    )


def plan_of(*steps: Transition) -> Plan:
    return Plan(
        transition=steps[-1],
        steps=steps,
        reason="",
        freed_bytes=0,
        capacity_before=10,
        capacity_after=20,
        decision=Decision(inputs={}, choices=()),
    )


def end_of(plan: Plan, refused: int) -> Event:
    members: Any = Members(refused)
    coordinator = Coordinator(members, ClusterConfig(num_instances=2), EventLog())
    return asyncio.run(coordinator.execute(lambda: plan))


def test_a_drop_stands_though_what_came_free_is_not_handed_out() -> None:
    drop = plan_drop(cluster(2), epoch=1, reason="", max_group_size=2).transition
    event = end_of(plan_of(drop, growth(drop.after[0], 2)), refused=2)
    assert (event.status, event.epoch) == (Outcome.COMMITTED, 1)
    assert "not now" in event.error


def test_growth_alone_that_is_refused_is_aborted() -> None:
    """And does not run for ever."""
    alone = cluster(2)
    state = carried_out(alone, plan_drop(alone, epoch=1, reason="", max_group_size=2))
    rebalance = growth(state.groups()[0], 2)
    assert rebalance.grows
    event = end_of(plan_of(rebalance), refused=2)
    assert event.status is Outcome.ABORTED
    assert "not now" in event.error


class CutOff(Members):
    """Member 1 votes, is out of reach when all is given up, and comes back."""

    def __init__(self) -> None:
        super().__init__(refused=1)
        self.there = True
        self.told: list[int] = []
        self.heard = asyncio.Event()

    async def call(self, instance: int, message: Any, timeout_s: float, **more: Any) -> Vote | Done:
        if isinstance(message, Abort):
            if instance == 1 and not self.there:
                raise NoAnswer(f"instance {instance} is not connected")
            self.told.append(instance)
            if instance == 1:
                self.heard.set()
        elif instance == 1:
            self.there = False
            return Vote(call=1, epoch=message.transition.epoch, ok=True)
        return await super().call(instance, message, timeout_s, **more)


def test_one_that_is_cut_off_hears_later_that_a_plan_is_given_up() -> None:
    """Until then it waits for a decision, and serves nobody."""

    async def run() -> list[int]:
        members = CutOff()
        hub: Any = members
        coordinator = Coordinator(hub, ClusterConfig(num_instances=2), EventLog())
        plan = plan_of(plan_drop(cluster(2), epoch=1, reason="", max_group_size=2).transition)
        event = await coordinator.execute(lambda: plan)
        assert event.status is Outcome.ABORTED
        assert members.told == [0]
        members.there = True
        async with asyncio.timeout(10):
            await members.heard.wait()
        coordinator.close()
        return members.told

    assert asyncio.run(run()) == [0, 1]
