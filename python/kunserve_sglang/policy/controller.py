"""When the cluster changes, and why: the one controller of the router and of the simulator.

It looks at snapshots and asks for one transition at a time. Whoever it serves plans that with
`plan` and `in_steps`, carries it out, and says how it ended.
"""

from __future__ import annotations

from kunserve_sglang.core.choices import OverloadPolicy
from kunserve_sglang.core.cluster_config import ClusterConfig
from kunserve_sglang.core.errors import KunServeError
from kunserve_sglang.core.first_token import FirstTokenLimit
from kunserve_sglang.core.messages import Attainable, TransitionKind
from kunserve_sglang.core.transports import ExchangeMode
from kunserve_sglang.policy.arrivals import Arrivals
from kunserve_sglang.policy.attainable import attainable
from kunserve_sglang.policy.bounds import Bounds
from kunserve_sglang.policy.calibration import Calibration
from kunserve_sglang.policy.decision import Decision, NoPlan
from kunserve_sglang.policy.dropping import weighed_drop, weighed_restore
from kunserve_sglang.policy.mean_owner import known_times
from kunserve_sglang.policy.monitor import OverloadMonitor
from kunserve_sglang.policy.planner import Plan, plan_drop, plan_restore
from kunserve_sglang.policy.service_level import LatencyLimits, ServiceLevel, Slowness, StepTimes
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
from kunserve_sglang.policy.weighing import Expected

WATCH_INTERVAL_S = 0.05
"""Seconds between two looks at a cluster, unless a look takes longer."""

TELL_INTERVAL_S = 0.5
"""Seconds between two times that instances are told what to admit, if that has changed."""

RETRY_S = 1.0
"""Seconds between a request that could not be met and the next one."""

FORGET_S = 10.0
"""Seconds in which nothing is wanted until what is declined then is a matter of its own."""

RECONSIDER_S = 0.25
"""The same where it is met whenever that is best: the load may soon be another."""


class Controller:
    """Decides for one cluster; all times are seconds of any one origin.

    `auto` says whether it may drop and restore. A group is one pool of slots, whoever made it, so
    they are divided by demand even if it may not.
    """

    def __init__(self, config: ClusterConfig) -> None:
        self.auto = config.overload_policy is not OverloadPolicy.NONE
        self.level = ServiceLevel(ttft_ms=config.slo_ttft_ms, tpot_ms=config.slo_tpot_ms)
        self._config = config
        self._arrivals = Arrivals()
        self._calibration = Calibration()
        self._bounds = Bounds()
        self._monitor = OverloadMonitor(
            Thresholds(drop=config.drop_threshold, restore=config.restore_threshold)
        )
        self._asked = False
        self._declined = False
        self._wanted_at = float("-inf")
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
        self._arrivals.observe(now, state)
        self._calibration.observe(now, state)
        if self._asked:
            return None
        request = self._monitor.observe(now, state)
        if request is None:
            self._declined &= now - self._wanted_at < FORGET_S
            return None
        self._wanted_at = now
        if now < self._retry_after:
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

    def admission(self, state: ClusterState) -> dict[int, Attainable]:
        """By instance, what it is to admit: `attainable`, and so many as hold the limits."""
        most = self.bounds(state)
        first_token = self.first_token(state)
        return {
            i: Attainable(slots=slots, running=most.get(i, 0), first_token=first_token)
            for i, slots in self.attainable(state).items()
        }

    def first_token(self, state: ClusterState) -> FirstTokenLimit:
        """Whose turn it is while requests wait."""
        limits = self.limits(state) if self.weighs else None
        return FirstTokenLimit() if limits is None else self.level.first_token(limits)

    def bounds(self, state: ClusterState) -> dict[int, int]:
        """By instance, how many requests it is to run where the slots of a group are for more."""
        return self._bounds.look(state, self._expected()) if self.weighs else {}

    @property
    def slowness(self) -> Slowness:
        """How many times as long as predicted decode steps have lately taken."""
        return self._calibration.slowness

    def limits(self, state: ClusterState) -> LatencyLimits | None:
        """Those of a request of usual length; None until somebody has measured costs."""
        times = self.times(state)
        return None if times is None else self.level.limits(times)

    def times(self, state: ClusterState) -> StepTimes | None:
        """What limits that were not named follow from; None until somebody has measured costs."""
        known = [s for s in state.instances if s.costs is not None]
        try:
            return known_times(known)
        except ValueError:
            return None

    def _expected(self) -> Expected:
        return Expected(
            level=self.level,
            arrivals_per_s=self._arrivals.per_second,
            slowness=self.slowness,
        )

    @property
    def weighs(self) -> bool:
        """Whether what users want decides."""
        return self.auto and self._config.overload_policy is not OverloadPolicy.DROP_ALWAYS

    def plan(self, request: TransitionRequest, state: ClusterState, epoch: int) -> Plan:
        """What the request would do, in one step. Raises `NoPlan`."""
        match request:
            case DropRequest():
                return self._drop(request, state, epoch)
            case RestoreRequest():
                plan = plan_restore(
                    state,
                    epoch=epoch,
                    reason=request.reason,
                    instances=request.instances,
                    stages=request.stages,
                    urgent=request.urgent,
                )
                weighed = request.weighed and self.weighs
                return weighed_restore(state, plan, self._expected()) if weighed else plan
            case RebalanceRequest():
                return plan_rebalance(
                    state, epoch=epoch, reason=request.reason, instances=request.instances
                )

    def _drop(self, request: DropRequest, state: ClusterState, epoch: int) -> Plan:
        def plan(largest: int, across: bool) -> Plan:
            return plan_drop(
                state,
                epoch=epoch,
                reason=request.reason,
                max_group_size=largest,
                instances=request.instances,
                tokens=request.tokens,
                tpot_limit_ms=self._config.tpot_limit_ms,
                across=across,
            )

        def other(largest: int, across: bool) -> Plan | None:
            try:
                return plan(largest, across)
            except NoPlan:
                return None

        full = plan(self._config.max_group_size, True)
        if not (request.weighed and self.weighs):
            return full
        return weighed_drop(state, full, other, self._expected())

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
        Once is enough, until a transition ends or nothing has been wanted for a while.
        """
        self._asked = False
        decision = error.decision if isinstance(error, NoPlan) else None
        self._retry_after = now + (RETRY_S if decision is None else RECONSIDER_S)
        if decision is None or self._declined:
            return None
        self._declined = True
        return decision
