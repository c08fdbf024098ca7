"""Whether to drop, how far, and whether to restore: by what users want, not by memory alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from kunserve_sglang.core.messages import TransitionKind
from kunserve_sglang.policy.decision import MOST_CHOICES, Choice, Decision, NoPlan
from kunserve_sglang.policy.mean_owner import known_times
from kunserve_sglang.policy.planner import Plan
from kunserve_sglang.policy.service_level import LimitsByShare
from kunserve_sglang.policy.state import ClusterState
from kunserve_sglang.policy.weighing import (
    SAME,
    Expected,
    Prospect,
    Prospects,
    in_words,
)

SHORT_OF_COMPUTING = "not memory is short but computing, so requests queue"
SOON_ENOUGH = "requests that queue keep their limits, so nothing is dropped for them"


def weighed_drop(
    state: ClusterState,
    full: Plan,
    other: Callable[[int, bool], Plan | None],
    expected: Expected,
) -> Plan:
    """`full`, the same with shorter pipelines or within hosts, or none of them.

    `other` makes the plan with pipelines of at most so many stages, across hosts or not, if there
    is one. Raises `NoPlan`, with all that was weighed, if it is best to let requests queue. Where
    costs are not known, or somebody could never be served as things are, it is `full`.
    """
    stuck = any(s.load.longest > s.load.slots.capacity for s in state.instances)
    if stuck or not _known(state, full):
        return full
    looks = [_Look(state, plan, expected) for plan in _candidates(state, full, other)]
    worth_it = [look for look in looks if look.then.better_than(look.now)]
    if not worth_it:
        why = SOON_ENOUGH if looks[0].now.forecast.attainment >= 1 - SAME else SHORT_OF_COMPUTING
        raise NoPlan(f"{looks[0].words()}: {why}", looks[0].decision(looks, None))
    best = max(worth_it, key=lambda look: look.gain)
    reason = f"{best.plan.reason}; {best.words()}: memory is short"
    decision = looks[0].decision(looks, best)
    return msgspec.structs.replace(best.plan, reason=reason, decision=decision)


def weighed_restore(state: ClusterState, plan: Plan, expected: Expected) -> Plan:
    """The plan, or `NoPlan` if more requests keep their limits without it for now."""
    if not _known(state, plan):
        return plan
    look = _Look(state, plan, expected)
    if look.now.forecast.attainment <= look.then.forecast.attainment + SAME:
        return plan
    raise NoPlan(f"{look.words()}: later", look.decision([look], None))


class _Look:
    """A plan, and what becomes of the requests of its instances with it and without."""

    def __init__(self, state: ClusterState, plan: Plan, expected: Expected) -> None:
        self.plan = plan
        self._prospects = Prospects(state, plan.instances, expected)
        after, stages = plan.transition.after, _stages(plan)
        drops = plan.transition.kind is TransitionKind.DROP
        self.now = self._prospects.as_it_is("let requests queue" if drops else "stay as it is")
        what = f"pipelines of up to {stages} stages" if stages > 1 else "full replicas"
        if any(map(state.spans_hosts, after)):
            what += ", some across hosts"
        self.then = self._prospects.after(what, after)

    @property
    def gain(self) -> tuple[float, float]:
        """Requests more within their limits, and how much sooner they end."""
        owners = len(self.plan.instances)
        more = owners * (self.then.forecast.within - self.now.forecast.within)
        return round(more), self.now.forecast.e2e_ms - self.then.forecast.e2e_ms

    def words(self) -> str:
        return in_words(self.now, self.then)

    def decision(self, looks: Sequence[_Look], best: _Look | None) -> Decision:
        limits = self._prospects.limits
        asked = self._prospects.requests
        inputs = {
            **self.plan.decision.inputs,
            "slo_ttft_ms": limits.ttft_ms,
            "slo_tpot_ms": limits.tpot_ms,
            "arrivals_per_s": asked.per_second * len(self.plan.instances),
            "prompt_tokens": asked.prompt,
            "output_tokens": asked.output,
            **_shares(self._prospects.by_share),
        }
        choices = [_choice(self.now, chosen=best is None)]
        choices += [_choice(look.then, chosen=look is best) for look in looks]
        others = [c for c in self.plan.decision.choices if not c.chosen]
        return Decision(inputs=inputs, choices=tuple([*choices, *others][:MOST_CHOICES]))


def _shares(by_share: LimitsByShare) -> dict[str, float]:
    """Whose limits were weighed, where not all have the same."""
    if len(by_share) == 1:
        return {}
    return {
        f"share_with_{limits.ttft_ms:.0f}_ms_and_{limits.tpot_ms:.0f}_ms_a_token": share
        for share, limits in by_share
    }


def _choice(prospect: Prospect, *, chosen: bool) -> Choice:
    told = prospect.forecast
    verdict = (
        f"{told.attainment:.0%} of requests within their limits, half of them after "
        f"{told.ttft_ms:.0f} ms and {told.tpot_ms:.0f} ms a token; {told.tokens_per_s:.0f} tokens/s"
    )
    return prospect.choice(verdict, chosen=chosen)


def _candidates(
    state: ClusterState, full: Plan, other: Callable[[int, bool], Plan | None]
) -> list[Plan]:
    """`full` first, then ever shorter pipelines; if some are across hosts, those that are not."""
    plans = [full]
    stages = _stages(full) - 1
    while stages > 1:
        plan = other(stages, True)
        if plan is None:
            break
        plans.append(plan)
        stages = min(stages, _stages(plan)) // 2
    if any(map(state.spans_hosts, full.transition.after)):
        near = other(_stages(full), False)
        if near is not None and all(near.transition.after != p.transition.after for p in plans):
            plans.append(near)
    return plans


def _stages(plan: Plan) -> int:
    return max(len(layout.members) for layout in plan.transition.after)


def _known(state: ClusterState, plan: Plan) -> bool:
    try:
        known_times([state.instance(i) for i in plan.instances])
    except ValueError:
        return False
    return True
