"""What a member objects to before it votes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from kunserve_sglang.core.layout import Layout
from kunserve_sglang.core.messages import Transition, TransitionKind
from kunserve_sglang.instance.transitions.objections import objection
from kunserve_sglang.policy.planner import plan_drop
from tests.support.clusters import carried_out, cluster

ME = 0
ALONE = cluster(2)
PAIR = carried_out(ALONE, plan_drop(ALONE, epoch=1, reason="", max_group_size=2))
GROUP = PAIR.groups()[0]
SLOTS = GROUP.member(ME).capacity


def member(largest: int, taken: int = 0) -> Any:
    """As far as it is asked; `largest` slots may be needed by one of its requests."""
    engine = SimpleNamespace(
        layer_count=PAIR.instance(ME).layer_count,
        evict_cached=lambda _: None,
        taken_slots=lambda: range(taken),
        largest_request=lambda: largest,
    )
    return SimpleNamespace(
        instance=ME,
        engine=engine,
        profile=PAIR.instance(ME).memory,
        pool=SimpleNamespace(free=0, driver=SimpleNamespace(mappable=lambda: 1 << 30)),
        kv=SimpleNamespace(pages=0),
    )


def divided_anew(mine: int) -> Transition:
    """So many slots more for this member, and as many fewer for the other."""
    members = tuple(
        msgspec.structs.replace(m, capacity=m.capacity + (mine if m.instance == ME else -mine))
        for m in GROUP.members
    )
    after = Layout(epoch=2, members=members)
    return Transition(epoch=2, kind=TransitionKind.REBALANCE, before=(GROUP,), after=(after,))


@pytest.mark.parametrize("slots", [-100, 100])
def test_a_request_that_fits_afterwards_is_no_matter(slots: int) -> None:
    assert objection(member(SLOTS - 100), GROUP, (), divided_anew(slots)) == ""


def test_no_slots_are_taken_from_a_request_that_may_need_them() -> None:
    refused = objection(member(SLOTS), GROUP, (), divided_anew(-100))
    assert f"a request may need {SLOTS} slots, {SLOTS - 100} would be left" in refused


def test_more_slots_are_welcome_though_they_are_not_all_that_is_needed() -> None:
    assert objection(member(3 * SLOTS), GROUP, (), divided_anew(100)) == ""


def test_nobody_gives_up_slots_that_are_taken() -> None:
    refused = objection(member(0, taken=SLOTS - 50), GROUP, (), divided_anew(-100))
    assert "requests hold" in refused


def test_slots_come_in_whole_blocks() -> None:
    body = member(0)
    body.profile = msgspec.structs.replace(body.profile, block_slots=SLOTS // 4)
    rest = SLOTS % (SLOTS // 4)
    refused = objection(body, GROUP, (), divided_anew(-rest - 1))
    assert refused.endswith(f"are not whole blocks of {SLOTS // 4}")
