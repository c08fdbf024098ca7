"""The control plane without sockets: the product's monitor and planner in simulated time."""

from __future__ import annotations

from kunserve_sglang.config import ClusterConfig, OverloadPolicy
from kunserve_sglang.policy.monitor import DropNeeded, OverloadMonitor, Thresholds
from kunserve_sglang.policy.planner import NoPlan, Plan, plan_drop, plan_restore
from kunserve_sglang.policy.state import ClusterState

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
        self._epoch = 0
        self._retry_after = 0.0

    def decide(self, now: float, state: ClusterState) -> Plan | None:
        """What to do now, if anything."""
        need = self._monitor.observe(now, state)
        if not self.auto or need is None or now < self._retry_after:
            return None
        self._epoch += 1
        try:
            if isinstance(need, DropNeeded):
                return plan_drop(
                    state,
                    epoch=self._epoch,
                    reason=need.reason,
                    max_group_size=self._config.max_group_size,
                    tokens=need.tokens,
                )
            return plan_restore(
                state, epoch=self._epoch, reason=need.reason, instances=need.instances
            )
        except NoPlan:
            self._retry_after = now + RETRY_S
            return None

    def ended(self, now: float, *, committed: bool) -> None:
        """The transition of the last plan is over."""
        self._monitor.transition_ended(now)
        if not committed:
            self._retry_after = now + RETRY_S
