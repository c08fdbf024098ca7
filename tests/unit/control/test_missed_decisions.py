"""Decisions that reach one member and not the other: each is made up for."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kunserve_sglang.core.layout import LayerRange, Layout, Member
from kunserve_sglang.core.messages import Commit
from kunserve_sglang.policy.agreement import Agreement, agreement
from kunserve_sglang.testing.mock_member import CAPACITY
from tests.support.mock_instance import MockInstance
from tests.support.model.cluster import ModelCluster
from tests.support.router_harness import RouterCluster
from tests.support.waiting import until

Start = Callable[..., RouterCluster]


def layout(epoch: int, *shares: int, cut: int = 2) -> Layout:
    """Of two members with these shares, cut between these layers."""
    parts = (LayerRange(0, cut), LayerRange(cut, 4))
    members = tuple(
        Member(instance=i, layers=part, capacity=share, address="")
        for i, (part, share) in enumerate(zip(parts, shares, strict=True))
    )
    return Layout(epoch=epoch, members=members)


NOW = layout(5, 20, 20)


@pytest.mark.parametrize(
    ("theirs", "expected"),
    [
        (NOW, Agreement.AGREES),
        (layout(6, 20, 30), Agreement.BEHIND),
        (layout(4, 20, 10), Agreement.AGREES),
        (layout(6, 10, 30), Agreement.OVERTAKEN),
        (layout(4, 30, 10), Agreement.AHEAD),
        (layout(6, 20, 20, cut=3), Agreement.OVERTAKEN),
        (layout(4, 20, 20, cut=3), Agreement.AHEAD),
    ],
    ids=["same", "grown", "not yet grown", "shifted", "not yet shifted", "moved", "not yet moved"],
)
def test_layouts_go_together_or_somebody_has_to_do_something(
    theirs: Layout, expected: Agreement
) -> None:
    assert agreement(NOW, theirs) is expected


def grown(instance: MockInstance) -> None:
    """It runs by a layout of its own group with more room than its mates know of."""
    old = instance.layout
    members = tuple(
        Member(instance=m.instance, layers=m.layers, capacity=m.capacity + 1, address=m.address)
        for m in old.members
    )
    instance.layout = Layout(epoch=old.epoch + 1, members=members)


def test_a_commit_that_gets_lost_comes_again(start_router: Start) -> None:
    """In each step of a drop."""
    router = start_router(2)
    missed: list[int] = []

    def first_of_each(message: Commit) -> bool:
        again = message.epoch in missed
        missed.append(message.epoch)
        return again

    router.instances[1].on_commit = first_of_each
    assert router.post("/kunserve/drop", {}).json["status"] == "committed"
    assert len(set(missed)) < len(missed)
    assert router.instances[0].layout == router.instances[1].layout
    assert router.post("/kunserve/restore", {}).json["status"] == "committed"


def test_a_member_that_has_missed_a_growth_catches_up(start_router: Start) -> None:
    """Nobody remembers that decision: only what they report says that there was one."""
    router = start_router(2)
    assert router.post("/kunserve/drop", {}).json["status"] == "committed"
    ahead, behind = router.instances
    grown(ahead)
    until(lambda: behind.layout == ahead.layout)
    assert not behind.lost
    assert router.post("/kunserve/restore", {}).json["status"] == "committed"


def test_members_whose_layouts_do_not_go_together_come_back_alone(start_router: Start) -> None:
    router = start_router(2)
    assert router.post("/kunserve/drop", {}).json["status"] == "committed"
    one, other = router.instances
    moved = tuple(
        Member(instance=m.instance, layers=m.layers, capacity=capacity, address=m.address)
        for m, capacity in zip(one.layout.members, (CAPACITY - 1, CAPACITY + 1), strict=True)
    )
    one.layout = Layout(epoch=one.layout.epoch + 1, members=moved)
    until(lambda: one.lost and other.lost)
    until(lambda: not one.layout.cooperative and not other.layout.cooperative)
    until(lambda: router.post("/kunserve/drop", {}).status == 200)


def test_a_late_commit_stops_no_scheduler() -> None:
    """One has it, the other goes by the packets of its peer: both run on at once.

    By chance, a member may have nothing to do in so short a time.
    """
    steps = [ModelCluster(seed).steps_without_a_commit() for seed in range(5)]
    assert sum(count > 0 for count in steps) >= 3
