"""The controller alone: one request at a time, pauses, and what it may do with the policy off."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from kunserve_sglang.core.choices import OverloadPolicy
from kunserve_sglang.core.cluster_config import ClusterConfig
from kunserve_sglang.core.errors import TransientError
from kunserve_sglang.core.messages import TransitionKind
from kunserve_sglang.core.transports import ExchangeMode
from kunserve_sglang.policy.controller import FORGET_S, RECONSIDER_S, RETRY_S, Controller
from kunserve_sglang.policy.decision import Decision, NoPlan
from kunserve_sglang.policy.planner import plan_drop
from kunserve_sglang.policy.state import ClusterState
from kunserve_sglang.policy.transition_request import (
    REQUEST_TYPES,
    DropRequest,
    Outcome,
    RebalanceRequest,
    RestoreRequest,
    TransitionRequest,
)
from tests.support.clusters import carried_out, cluster, with_load

INDEPENDENT = cluster(2)
PAIR = carried_out(INDEPENDENT, plan_drop(INDEPENDENT, epoch=1, reason="", max_group_size=8))
REJECTED = NoPlan("every drop would be too slow", Decision(inputs={}, choices=()))
NOTHING_TO_DO = NoPlan("no two groups can be merged any further")
NOT_ITS_TURN = TransientError("transition 3 (drop) is still running")


def loaded(state: ClusterState, *shares: float) -> ClusterState:
    """Instances with a demand of these shares of their slots; above one, requests wait."""
    return ClusterState(
        instances=tuple(
            with_load(s, demand=int(share * s.load.slots.capacity), waiting=3 if share > 1 else 0)
            for s, share in zip(state.instances, shares, strict=True)
        )
    )


def controller(**config: Any) -> Controller:
    return Controller(ClusterConfig(num_instances=2, **config))


def overloaded(asked: Controller, now: float) -> TransitionRequest | None:
    return asked.decide(now, loaded(INDEPENDENT, 1.5, 1.5))


def until_asked(asked: Controller, state: ClusterState, now: float = 0.0) -> TransitionRequest:
    """What it asks for if things stay like that for up to twenty seconds."""
    for tick in range(200):
        request = asked.decide(now + tick / 10, state)
        if request is not None:
            return request
    raise AssertionError("it asks for nothing")


class Life(RuleBasedStateMachine):
    """Any observations and any ends, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.controller = controller()
        self.now = 0.0
        self.pending: TransitionRequest | None = None
        self.paused_until = float("-inf")
        self.explained = False
        self.asked_at = float("-inf")
        self.may_forget = False

    @rule(
        state=st.sampled_from([INDEPENDENT, PAIR]),
        shares=st.tuples(*[st.sampled_from([0.1, 0.6, 1.2, 3.0])] * 2),
        looks=st.integers(1, 60),
    )
    def look(self, state: ClusterState, shares: tuple[float, float], looks: int) -> None:
        for _ in range(looks):
            self.now += 0.1
            request = self.controller.decide(self.now, loaded(state, *shares))
            if request is None:
                continue
            assert self.pending is None
            assert self.now >= self.paused_until
            assert self.controller.auto or request.kind is TransitionKind.REBALANCE
            assert request.reason
            self.pending = request
            self.may_forget |= self.now - self.asked_at >= FORGET_S
            self.asked_at = self.now

    @precondition(lambda self: self.pending is not None)
    @rule(outcome=st.sampled_from([Outcome.COMMITTED, Outcome.ABORTED, Outcome.FAILED]))
    def end(self, outcome: Outcome) -> None:
        assert self.pending is not None
        self.controller.ended(self.now, self.pending.kind, outcome)
        self.pending, self.explained = None, False
        if outcome is not Outcome.COMMITTED:
            self.paused_until = self.now + RETRY_S

    @precondition(lambda self: self.pending is not None)
    @rule(error=st.sampled_from([REJECTED, NOTHING_TO_DO, NOT_ITS_TURN]))
    def refuse(self, error: TransientError) -> None:
        explains = self.controller.refused(self.now, error) is not None
        if error is not REJECTED:
            assert not explains
        elif not self.explained:
            assert explains
        elif explains:  # again, but not in the same matter
            assert self.may_forget
        self.may_forget &= not explains
        self.pending = None
        self.explained |= explains
        self.paused_until = self.now + (RECONSIDER_S if error is REJECTED else RETRY_S)

    @precondition(lambda self: self.pending is None)
    @rule(kind=st.sampled_from(TransitionKind), outcome=st.sampled_from([*Outcome]))
    def end_one_begun_by_hand(self, kind: TransitionKind, outcome: Outcome) -> None:
        self.controller.ended(self.now, kind, outcome)
        self.explained = False

    @rule(auto=st.booleans())
    def switch(self, auto: bool) -> None:
        self.controller.auto = auto


Life.TestCase.settings = settings(max_examples=100)
TestLife = Life.TestCase


def test_it_asks_for_what_is_needed() -> None:
    assert isinstance(until_asked(controller(), loaded(INDEPENDENT, 1.5, 1.5)), DropRequest)
    assert until_asked(controller(), loaded(PAIR, 3.0, 0.1)).kind is TransitionKind.REBALANCE
    restore = until_asked(controller(), loaded(PAIR, 0.1, 0.1))
    assert isinstance(restore, RestoreRequest)
    assert (restore.instances, restore.stages) == ((0, 1), 1)


def test_with_the_policy_off_a_group_is_rebalanced_and_nothing_else() -> None:
    off = controller(overload_policy=OverloadPolicy.NONE)
    for state in (loaded(INDEPENDENT, 1.5, 1.5), loaded(PAIR, 0.1, 0.1), loaded(PAIR, 3.0, 3.0)):
        for tick in range(200):
            assert off.decide(tick / 10, state) is None
    assert isinstance(until_asked(off, loaded(PAIR, 3.0, 0.1), now=20.0), RebalanceRequest)
    off.auto = True
    off.refused(40.0, NOTHING_TO_DO)
    assert isinstance(until_asked(off, loaded(INDEPENDENT, 1.5, 1.5), now=50.0), DropRequest)


@pytest.mark.parametrize("outcome", [None, Outcome.ABORTED, Outcome.FAILED])
def test_after_a_failure_it_waits_and_then_asks_again(outcome: Outcome | None) -> None:
    asked = controller(drop_threshold=0.9)
    until_asked(asked, loaded(INDEPENDENT, 1.5, 1.5))
    if outcome is None:
        asked.refused(10.0, NOTHING_TO_DO)
    else:
        asked.ended(10.0, TransitionKind.DROP, outcome)
    assert overloaded(asked, 10.0) is None
    assert overloaded(asked, 10.0 + RETRY_S - 0.01) is None
    assert isinstance(overloaded(asked, 10.0 + RETRY_S), DropRequest)


def test_after_a_success_it_does_not_wait() -> None:
    asked = controller()
    until_asked(asked, loaded(INDEPENDENT, 1.5, 1.5))
    asked.ended(10.0, TransitionKind.DROP, Outcome.COMMITTED)
    hold = asked.thresholds.drop_hold_s
    assert overloaded(asked, 10.0) is None
    assert isinstance(overloaded(asked, 10.1 + hold), DropRequest)


def test_a_drop_begun_by_hand_starts_the_cool_down_and_no_pause() -> None:
    asked = controller()
    asked.ended(0.0, TransitionKind.DROP, Outcome.COMMITTED)
    idle = loaded(PAIR, 0.1, 0.1)
    early = [asked.decide(tick / 10, idle) for tick in range(48)]
    assert early == [None] * 48
    assert isinstance(until_asked(asked, idle, now=4.9), RestoreRequest)
    other = controller()
    other.ended(0.0, TransitionKind.DROP, Outcome.ABORTED)
    assert overloaded(other, 0.1) is None
    assert isinstance(overloaded(other, 0.4), DropRequest)


@pytest.mark.parametrize("kind", TransitionKind)
def test_a_plan_says_what_was_asked_for_and_why(kind: TransitionKind) -> None:
    state = loaded(INDEPENDENT if kind is TransitionKind.DROP else PAIR, 0.2, 0.1)
    request = REQUEST_TYPES[kind](reason="why not")
    plan = controller().plan(request, state, 7)
    assert (plan.transition.kind, plan.transition.epoch) == (kind, 7)
    assert (plan.reason, plan.instances) == ("why not", [0, 1])
    assert plan.steps == (plan.transition,)


def test_requests_keep_to_the_limits_of_the_cluster() -> None:
    four = cluster(4, demand=1000, waiting=1)
    plan = controller(max_group_size=2).plan(DropRequest(tokens=10**9), four, 1)
    assert {len(g.members) for g in plan.transition.after} == {2}
    named = controller().plan(DropRequest(instances=(1, 3)), four, 1)
    assert named.instances == [1, 3]
    with pytest.raises(NoPlan, match="largest group, 2"):
        controller(max_group_size=2).plan(DropRequest(instances=(0, 1, 3)), four, 1)


def test_steps_are_those_of_the_exchange_mode() -> None:
    request = DropRequest(tokens=1)
    for mode, steps in ((ExchangeMode.COORDINATED, 2), (ExchangeMode.STOP, 1)):
        one = controller(exchange=mode)
        plan = one.plan(request, INDEPENDENT, 1)
        assert len(one.in_steps(plan, INDEPENDENT).steps) == steps


def test_a_restore_is_unwanted_when_requests_wait_again() -> None:
    asked = controller()
    plan = asked.plan(RestoreRequest(), loaded(PAIR, 0.1, 0.1), 2)
    assert asked.unwanted(plan, loaded(PAIR, 0.1, 0.9)) == ""
    assert "instances [1]" in asked.unwanted(plan, loaded(PAIR, 0.1, 1.2))
    asked.auto = False
    assert asked.unwanted(plan, loaded(PAIR, 0.1, 1.2)) == ""
