"""The search for a drop: the shortest pipelines within all limits, and a record of the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kunserve_sglang.core.layout import Layout, Member
from kunserve_sglang.policy.decision import MOST_CHOICES, Choice, Decision, NoPlan
from kunserve_sglang.policy.grouping import Grouping, group_up, group_up_within_hosts
from kunserve_sglang.policy.shapes import Shapes
from kunserve_sglang.policy.state import ClusterState
from kunserve_sglang.policy.tpot import predicted_tpot_ms


class Change(NamedTuple):
    """Groups before, what becomes of them, and the bytes of parameters that this frees."""

    before: list[Layout]
    after: list[Layout]
    freed_bytes: int


class DropSearch:
    """The search for a drop; remembers what it has looked at. One search, one plan."""

    def __init__(
        self,
        state: ClusterState,
        epoch: int,
        largest: int,
        tpot_limit_ms: float | None,
        tokens: int | None,
    ) -> None:
        self._state = state
        self._epoch = epoch
        # No buffer has room for more owners than its instance was started for.
        self._largest = min([largest, *(s.memory.owners for s in state.instances)])
        self._limit_ms = tpot_limit_ms
        self._tokens = tokens
        self._shapes = Shapes(state)
        self._choices: list[Choice] = []

    def decision(self) -> Decision:
        inputs: dict[str, float] = {
            "demand": self._state.demand,
            "capacity": self._state.capacity,
            "waiting": sum(s.load.waiting for s in self._state.instances),
            "largest_group": self._largest,
        }
        if self._tokens is not None:
            inputs["slots_asked"] = self._tokens
        if self._limit_ms is not None:
            inputs["tpot_limit_ms"] = self._limit_ms
        return Decision(inputs=inputs, choices=tuple(self._choices[-MOST_CHOICES:]))

    def named(self, groups: list[Layout]) -> Change:
        """All `groups` as one."""
        size = sum(len(g.members) for g in groups)
        if size > self._largest:
            raise NoPlan(f"a group of {size} would exceed the largest group, {self._largest}")
        shape = self._shapes.together(groups)
        after = [merged(self._state, self._shapes, groups, shape, self._epoch)]
        gained = slots(after) - slots(groups)
        what = f"these instances as one group of {size}"
        if (tpot_ms := self._slowest(after)) is not None and self._breaks(tpot_ms):
            self._reject(what, size, gained, tpot_ms)
            raise self._queue()
        self._note(what, size, gained, tpot_ms, "as asked for", chosen=True)
        return Change(groups, after, self._shapes.freed_bytes(shape))

    def cheapest(self, tokens: int, *, across: bool = True) -> Change:
        """The shortest pipelines that bring `tokens` more slots within the limits.

        Without `across`, only those that are within a host, and as many slots as these bring.
        """
        largest, groups = self._largest, self._state.groups()
        group = group_up if across else group_up_within_hosts
        while True:
            found = group(self._state, self._shapes, tokens, largest, groups)
            if not found.sets:
                break
            before = [g for s in found.sets for g in s.groups]
            after = [
                merged(self._state, self._shapes, s.groups, s.shape, self._epoch)
                for s in found.sets
            ]
            stages = max(len(g.members) for g in after)
            tpot_ms = self._slowest(after)
            what = _pipelines(stages)
            if tpot_ms is None or not self._breaks(tpot_ms):
                self._too_short(found, tokens)
                verdict = _enough(found, tokens)
                self._note(what, stages, found.gained, tpot_ms, verdict, chosen=True)
                freed = sum(self._shapes.freed_bytes(s.shape) for s in found.sets)
                return Change(before, after, freed)
            self._reject(what, stages, found.gained, tpot_ms)
            largest = stages - 1
        raise self._queue() if self._choices else NoPlan("no two groups can be merged any further")

    def _slowest(self, layouts: Sequence[Layout]) -> float | None:
        times = [
            predicted_tpot_ms(layout, [self._state.instance(i) for i in layout.ids])
            for layout in layouts
        ]
        return max((t for t in times if t is not None), default=None)

    def _breaks(self, tpot_ms: float) -> bool:
        return self._limit_ms is not None and tpot_ms > self._limit_ms

    def _queue(self) -> NoPlan:
        return NoPlan(
            "every drop would break the limit for the time per output token, so requests queue: "
            + "; ".join(f"{c.what}: {c.verdict}" for c in self._choices),
            self.decision(),
        )

    def _too_short(self, found: Grouping, tokens: int) -> None:
        for stop in found.stops[:-1]:
            missing = f"{tokens - stop.gained} slots too few"
            self._note(_pipelines(stop.stages), stop.stages, stop.gained, None, missing)

    def _reject(self, what: str, stages: int, slots: int, tpot_ms: float) -> None:
        verdict = f"an output token would take {tpot_ms:.0f} ms of {self._limit_ms:g} ms"
        self._note(what, stages, slots, tpot_ms, verdict)

    def _note(
        self,
        what: str,
        stages: int,
        slots: int,
        tpot_ms: float | None,
        verdict: str,
        *,
        chosen: bool = False,
    ) -> None:
        self._choices.append(
            Choice(
                what=what,
                stages=stages,
                slots=slots,
                chosen=chosen,
                verdict=verdict,
                tpot_ms=tpot_ms,
            )
        )


def _pipelines(stages: int) -> str:
    return f"pipelines of up to {stages} stages"


def merged(
    state: ClusterState, shapes: Shapes, groups: Sequence[Layout], shape: int, epoch: int
) -> Layout:
    """`groups`, of which `shape` is the shape together, as one. Raises `NoPlan`: no cut."""
    ranges, capacity = shapes.cut(shape)
    ids = shapes.order(groups)
    if not ranges:
        raise NoPlan(f"{state.instance(ids[0]).layer_count} layers cannot be cut for {ids}")
    return Layout(
        epoch=epoch,
        members=tuple(
            Member(instance=i, layers=r, capacity=capacity, address=state.instance(i).address)
            for i, r in zip(ids, ranges, strict=True)
        ),
    )


def slots(layouts: Sequence[Layout]) -> int:
    """Token slots of all owners."""
    return sum(m.capacity for layout in layouts for m in layout.members)


def _enough(found: Grouping, tokens: int) -> str:
    if found.gained >= tokens:
        return "the shortest pipelines that free enough"
    return f"frees the most; requests that need {tokens - found.gained} more slots queue"
