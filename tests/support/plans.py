"""Plans made and carried out at once, for tests of the planner."""

from __future__ import annotations

from kunserve_sglang.policy.planner import Plan, plan_drop
from kunserve_sglang.policy.state import ClusterState
from tests.support.clusters import carried_out


def drop(state: ClusterState, tokens: int | None = None, *instances: int) -> ClusterState:
    plan = plan_drop(
        state,
        epoch=1,
        reason="",
        max_group_size=8,
        tokens=tokens,
        instances=instances or None,
    )
    return carried_out(state, plan)


def plan(state: ClusterState, tokens: int, limit_ms: float | None = None) -> Plan:
    return plan_drop(
        state, epoch=1, reason="", max_group_size=8, tokens=tokens, tpot_limit_ms=limit_ms
    )


def gained(plan: Plan) -> int:
    return plan.capacity_after - plan.capacity_before
