"""To whom an instance connects for a transition."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import pytest

from kunserve_sglang.core.errors import PeerLost
from kunserve_sglang.instance.parts.instance_parts import InstanceParts
from kunserve_sglang.policy.planner import plan_drop
from tests.support.clusters import cluster

DROP = plan_drop(cluster(2), epoch=1, reason="", max_group_size=2).transition


class Plane:
    """One whose connections to `ended` have."""

    def __init__(self, *ended: int) -> None:
        self._ended = set(ended)
        self.connected: set[int] = set()

    def lost(self, peers: Collection[int]) -> str:
        found = sorted(self._ended.intersection(peers))
        return f"{found} ended" if found else ""

    def connect(self, peers: Mapping[int, str]) -> None:
        self.connected = set(peers)


class Control:
    """The router has nothing to say."""

    def check_for_losses(self, epoch: int) -> None:
        assert epoch == 7


def parts(plane: Plane) -> InstanceParts:
    nothing: Any = None
    here: Any = plane
    control: Any = Control()
    return InstanceParts(0, *[nothing] * 5, here, control, nothing)


def test_one_alone_connects_to_all_however_it_was_connected_before() -> None:
    plane = Plane(1)
    parts(plane).connect(DROP, [0])
    assert plane.connected == {1}


def test_a_group_with_a_connection_that_has_ended_is_not_connected_anew() -> None:
    """What was on its way is missing for good, and has to be missed."""
    plane = Plane(1)
    with pytest.raises(PeerLost, match=r"\[1\] ended"):
        parts(plane).connect(DROP, [0, 1])
    assert not plane.connected


def test_nobody_waits_for_a_peer_whose_connection_has_ended() -> None:
    """The router may not know of it: to it, a member that was cut off is as it was before."""
    parts(Plane(2)).check_for_losses(7, [0, 1])
    with pytest.raises(PeerLost, match=r"\[1\] ended"):
        parts(Plane(1)).check_for_losses(7, [0, 1])
