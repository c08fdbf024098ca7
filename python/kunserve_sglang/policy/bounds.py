"""How many requests an instance may run, so that their tokens keep their limit.

Where there are slots for more requests than can be served in time, as after many a drop, all of
them may miss their limits together. With a bound, those that run keep theirs, and the others wait.
It is set while a forecast says that more keep their limits that way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from kunserve_sglang.core.layout import Layout
from kunserve_sglang.policy.state import ClusterState
from kunserve_sglang.policy.weighing import Expected, Prospects

AT_ONCE = 8
"""Groups that are looked at together: a forecast takes milliseconds, and all else waits for it."""


class Bounds:
    """Those of all groups, also of one instance; of many, each is looked at when it is its turn."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], int | None] = {}
        """By group, the one that was looked at last coming last."""

    def look(self, state: ClusterState, expected: Expected) -> dict[int, int]:
        """By instance, for members of groups of which all have measured what their steps cost."""
        groups = {g.ids: g for g in state.groups() if self._concerns(state, g)}
        self._known = {ids: most for ids, most in self._known.items() if ids in groups}
        new = [ids for ids in groups if ids not in self._known]
        for ids in [*new, *self._known][:AT_ONCE]:
            self._known.pop(ids, None)
            self._known[ids] = bound(state, groups[ids], expected)
        return _by_member(self._known.items())

    def _concerns(self, state: ClusterState, group: Layout) -> bool:
        """Not an instance alone where nobody waits, unless that is because of its bound."""
        waiting = any(state.instance(i).load.waiting for i in group.ids)
        return group.cooperative or waiting or self._known.get(group.ids) is not None


def bound(state: ClusterState, group: Layout, expected: Expected) -> int | None:
    """How many requests each member is to run; None: as many as it can."""
    owners = [state.instance(i) for i in group.ids]
    if not any(s.load.waiting + s.load.running for s in owners):
        return None
    try:
        most = Prospects(state, group.ids, expected).bound()
    except ValueError:  # costs are not known
        return None
    return math.floor(most) if most < math.inf else None


def _by_member(known: Iterable[tuple[tuple[int, ...], int | None]]) -> dict[int, int]:
    return {i: most for ids, most in known if most is not None for i in ids}
