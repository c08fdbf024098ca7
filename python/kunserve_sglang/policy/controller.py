"""When the cluster changes, and why: the one controller of the router and of the simulator.

It looks at snapshots and asks for one transition at a time. Whoever it serves plans that with
`plan` and `in_steps`, carries it out, and says how it ended.
"""

from __future__ import annotations

from kunserve_sglang.core.errors import KunServeError
from kunserve_sglang.core.messages import TransitionKind
from kunserve_sglang.core.settings import ClusterConfig, ExchangeMode, OverloadPolicy
from kunserve_sglang.policy.attainable import attainable
from kunserve_sglang.policy.decision import Decision, NoPlan
from kunserve_sglang.policy.monitor import OverloadMonitor
from kunserve_sglang.policy.planner import Plan, plan_drop, plan_restore
from kunserve_sglang.policy.shares import plan_rebalance
from kunserve_sglang.policy.staging import staged
from kunserve_sglang.policy.state import ClusterState
from kunserve_sglang.policy.thresholds import Thresholds
from kunserve_sglang.policy.transition_request import (
    DropRequest,
    Outcome,
    RebalanceRequest,
    RestoreRequest,
    TransitionRequest,
)

WATCH_INTERVAL_S = 0.05
"""Seconds between two looks at a cluster, unless a look takes longer."""

RETRY_S = 1.0
"""Seconds between a request that could not be met and the next one."""


class Controller:
    """Decides for one cluster; all times are seconds of any one origin.

    `auto` says whether it may drop and restore. A group is one pool of slots, whoever made it, so
    they are divided by demand even if it may not.
    """

    def __init__(self, config: ClusterConfig) -> None:
        self.auto = config.overload_policy is OverloadPolicy.DROP
        self._config = config
        self._monitor = OverloadMonitor(
            Thresholds(drop=config.drop_threshold, restore=config.restore_threshold)
        )
        self._asked = False
        self._declined = False
        self._retry_after = float("-inf")

    @property
    def thresholds(self) -> Thresholds:
        return self._monitor.thresholds

    @thresholds.setter
    def thresholds(self, thresholds: Thresholds) -> None:
        self._monitor.thresholds = thresholds

    # -- decide ----------------------------------------------------------------------------------

    def decide(self, now: float, state: ClusterState) -> TransitionRequest | None:
        """What has to be done now, if anything; then nothing until `ended` or `refused`."""
        if self._asked:
            return None
        request = self._monitor.observe(now, state)
        if request is None or now < self._retry_after:
            return None
        if not self.auto and request.kind is not TransitionKind.REBALANCE:
            return None
        self._asked = True
        return request

    def attainable(self, state: ClusterState) -> dict[int, int]:
        """By instance, how many slots a single request may count on: see `policy.attainable`."""
        return attainable(
            state,
            may_drop=self.auto,
            max_group_size=self._config.max_group_size,
            tpot_limit_ms=self._config.tpot_limit_ms,
        )

    def plan(self, request: TransitionRequest, state: ClusterState, epoch: int) -> Plan:
        """What the request would do, in one step. Raises `NoPlan`."""
        match request:
            case DropRequest():
                return plan_drop(
                    state,
                    epoch=epoch,
                    reason=request.reason,
                    max_group_size=self._config.max_group_size,
                    instances=request.instances,
                    tokens=request.tokens,
                    tpot_limit_ms=self._config.tpot_limit_ms,
                )
            case RestoreRequest():
                return plan_restore(
                    state,
                    epoch=epoch,
                    reason=request.reason,
                    instances=request.instances,
                    stages=request.stages,
                )
            case RebalanceRequest():
                return plan_rebalance(
                    state, epoch=epoch, reason=request.reason, instances=request.instances
                )

    def in_steps(self, plan: Plan, state: ClusterState) -> Plan:
        """The plan as members carry it out, `state` being what it was made of."""
        return plan if self._config.exchange is ExchangeMode.STOP else staged(plan, state)

    def unwanted(self, plan: Plan, state: ClusterState) -> str:
        """Why a restore under way should be given up: its slots are needed after all. "" if not."""
        if not self.auto:
            return ""
        short = [
            s.instance
            for s in state.instances
            if s.instance in plan.instances and self._monitor.short(s)
        ]
        return f"requests wait for slots on instances {short} again" if short else ""

    # -- be told ---------------------------------------------------------------------------------

    def ended(self, now: float, kind: TransitionKind, outcome: Outcome) -> None:
        """A transition is over: the one asked for or, if none was, one that others began."""
        if outcome is not Outcome.ABORTED:
            self._monitor.transition_ended(now, kind)
        if self._asked and outcome is not Outcome.COMMITTED:
            self._retry_after = now + RETRY_S
        self._asked = self._declined = False

    def refused(self, now: float, error: KunServeError) -> Decision | None:
        """Nothing was begun, because of `error`: no plan, or another transition is under way.

        Returns the decision to put on record if all plans were rejected and requests have to queue.
        Once is enough, for as long as no transition ends.
        """
        self._asked = False
        self._retry_after = now + RETRY_S
        decision = error.decision if isinstance(error, NoPlan) else None
        if decision is None or self._declined:
            return None
        self._declined = True
        return decision
