"""The control plane without sockets: the product's monitor and planner in simulated time."""

from __future__ import annotations

from kunserve_sglang.core.messages import TransitionKind
from kunserve_sglang.core.settings import ClusterConfig, ExchangeMode, OverloadPolicy
from kunserve_sglang.policy.monitor import DropNeeded, Need, OverloadMonitor
from kunserve_sglang.policy.planner import NoPlan, Plan, plan_drop, plan_restore
from kunserve_sglang.policy.shares import SkewedGroup, plan_rebalance
from kunserve_sglang.policy.staging import STEPS, staged
from kunserve_sglang.policy.state import ClusterState
from kunserve_sglang.policy.thresholds import Thresholds

RETRY_S = 1.0
"""As `router.control_plane`: the pause after a plan that could not be made or was refused."""


class Control:
    """Decides as `router.control_plane.ControlPlane` does, one transition at a time."""

    def __init__(self, config: ClusterConfig) -> None:
        self.auto = config.overload_policy is OverloadPolicy.DROP
        self._config = config
        self._monitor = OverloadMonitor(
            Thresholds(drop=config.drop_threshold, restore=config.restore_threshold)
        )
        self._epoch = 1
        self._retry_after = 0.0

    def decide(self, now: float, state: ClusterState) -> Plan | None:
        """What to do now, if anything."""
        need = self._monitor.observe(now, state)
        if not self.auto or need is None or now < self._retry_after:
            return None
        try:
            plan = self._plan(need, state)
        except NoPlan:
            self._retry_after = now + RETRY_S
            return None
        finally:
            self._epoch += STEPS
        return plan if self._config.exchange is ExchangeMode.STOP else staged(plan, state)

    def _plan(self, need: Need, state: ClusterState) -> Plan:
        if isinstance(need, DropNeeded):
            return plan_drop(
                state,
                epoch=self._epoch,
                reason=need.reason,
                max_group_size=self._config.max_group_size,
                tokens=need.tokens,
                tpot_limit_ms=self._config.tpot_limit_ms,
            )
        if isinstance(need, SkewedGroup):
            return plan_rebalance(
                state, epoch=self._epoch, reason=need.reason, instances=need.instances
            )
        return plan_restore(
            state,
            epoch=self._epoch,
            reason=need.reason,
            instances=need.instances,
            stages=need.stages,
        )

    def unwanted(self, plan: Plan, state: ClusterState) -> bool:
        """Whether a restore that has begun should be given up: its slots are needed after all."""
        return any(self._monitor.short(state.instance(i)) for i in plan.instances)

    def ended(self, now: float, kind: TransitionKind, *, committed: bool) -> None:
        """The transition of the last plan is over."""
        if committed:
            self._monitor.transition_ended(now, kind)
        else:
            self._retry_after = now + RETRY_S
