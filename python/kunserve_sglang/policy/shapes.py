"""Groups without names: what they hold, and how much fits if they are merged."""

from __future__ import annotations

from collections.abc import Sequence

from kunserve_sglang.core.cuts import best_cut
from kunserve_sglang.core.layout import LayerRange, Layout, MemoryProfile
from kunserve_sglang.policy.state import ClusterState

_Kind = tuple[tuple[int, int, int], ...]
"""What a group is made of: `(budget, lo, hi)` of each member, in pipeline order."""


class Shapes:
    """Groups as numbers: what they hold and how much fits, whoever their members are.

    Most instances of a cluster are alike, so that few cuts have to be worked out, each once.
    """

    def __init__(self, state: ClusterState) -> None:
        self._state = state
        self._members: dict[int, tuple[int, int, int]] = {}
        self._budgets: dict[MemoryProfile, int] = {}
        self._memory: list[MemoryProfile] = []
        self._numbers: dict[_Kind, int] = {}
        self._kinds: list[_Kind] = []
        self._cuts: dict[int, tuple[tuple[LayerRange, ...], int]] = {}
        self._freed: dict[int, int] = {}
        self._merged: dict[tuple[int, int], int] = {}

    def of(self, group: Layout) -> int:
        """The shape of a group as it is."""
        if len(group.members) == 1:
            (only,) = group.members
            return self._intern((self._member(only.instance, only.layers),))
        return self._number([self._member(m.instance, m.layers) for m in group.members])

    def merged(self, one: int, other: int) -> int:
        """The shape of two groups together."""
        number = self._merged.get((one, other))
        if number is None:
            number = self._number([*self._kinds[one], *self._kinds[other]])
            self._merged[one, other] = number
        return number

    def slots(self, shape: int) -> int:
        """Token slots of all members, were they one group; 0 if no cut gives each a part."""
        _, slots = self.cut(shape)
        return slots * len(self._kinds[shape])

    def size(self, shape: int) -> int:
        """How many members it has."""
        return len(self._kinds[shape])

    def cut(self, shape: int) -> tuple[tuple[LayerRange, ...], int]:
        """The layers of each member and the slots of each owner; no ranges if no cut exists."""
        if shape not in self._cuts:
            kind = self._kinds[shape]
            held = tuple(LayerRange(lo, hi) for _, lo, hi in kind)
            try:
                found = best_cut(held, tuple(self._memory[budget] for budget, _, _ in kind))
            except ValueError:
                found = (), 0
            self._cuts[shape] = found
        return self._cuts[shape]

    def freed_bytes(self, shape: int) -> int:
        """Parameters that its members need no more once they have cut the layers."""
        if shape not in self._freed:
            ranges, _ = self.cut(shape)
            freed = 0
            for (budget, lo, hi), kept in zip(self._kinds[shape], ranges, strict=True):
                memory = self._memory[budget]
                pages = memory.parameter_pages(LayerRange(lo, hi)) - memory.parameter_pages(kept)
                freed += pages * memory.page_bytes
            self._freed[shape] = freed
        return self._freed[shape]

    def together(self, groups: Sequence[Layout]) -> int:
        """The shape of all these groups as one."""
        return self._number([self._member(m.instance, m.layers) for g in groups for m in g.members])

    def order(self, groups: Sequence[Layout]) -> list[int]:
        """The instances of `groups` in the pipeline order that their merged shape assumes."""
        members = []
        for group in groups:
            for member in group.members:
                budget, lo, hi = self._member(member.instance, member.layers)
                members.append((lo + hi, budget, lo, member.instance))
        members.sort()
        return [instance for *_, instance in members]

    def _member(self, instance: int, layers: LayerRange) -> tuple[int, int, int]:
        member = self._members.get(instance)
        if member is None:
            memory = self._state.instance(instance).memory
            budget = self._budgets.setdefault(memory, len(self._memory))
            if budget == len(self._memory):
                self._memory.append(memory)
            member = self._members[instance] = (budget, layers.lo, layers.hi)
        return member

    def _number(self, members: list[tuple[int, int, int]]) -> int:
        return self._intern(tuple(sorted(members, key=_place)))

    def _intern(self, kind: _Kind) -> int:
        number = self._numbers.setdefault(kind, len(self._kinds))
        if number == len(self._kinds):
            self._kinds.append(kind)
        return number


def _place(member: tuple[int, int, int]) -> tuple[int, int, int]:
    """Members stand in the order of the middle of what they hold."""
    budget, lo, hi = member
    return lo + hi, budget, lo
