"""The matrix of faults: whom one strikes, how, and in the middle of what. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import product
from typing import NamedTuple


class Target(StrEnum):
    """Who suffers."""

    ROUTER = "router"
    OWNER = "owner"
    """An instance with running requests, alone on its host."""

    STAGE = "stage"
    """An instance that has none, alone on its host: all requests are elsewhere."""

    HOST = "host"
    """The other host, with two instances and their launcher."""


class Cause(StrEnum):
    """How."""

    KILL = "kill -9"
    PAUSE = "SIGSTOP 5 s"
    STOP = "SIGSTOP"
    ONE_WAY = "cut one way"
    BOTH_WAYS = "cut both ways"

    @property
    def is_cut(self) -> bool:
        """Whether connections suffer, and no process."""
        return self in (Cause.ONE_WAY, Cause.BOTH_WAYS)


class Phase(StrEnum):
    """In the middle of what."""

    INDEPENDENT = "independent"
    PREPARING = "preparing"
    COMMITTING = "committing"
    EXCHANGING = "exchanging"
    COOPERATING = "cooperating"
    GROWING = "growing"
    RESTORING = "restoring"


class Transition(StrEnum):
    """What has to be going on for a phase."""

    DROP = "drop"
    RESTORE = "restore"


IN_GROUP = (Phase.COOPERATING, Phase.RESTORING)
"""Here the group is there before the requests are."""


class LoadKind(NamedTuple):
    """Which requests: `gathered` at one instance, some `seeded`, begun in a group or not."""

    gathered: bool
    seeded: bool
    grouped: bool = False


@dataclass(frozen=True, slots=True)
class Cell:
    """One trial. `seed` chooses the point inside the phase, and the direction of a cut."""

    target: Target
    cause: Cause
    phase: Phase
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.target}, {self.cause}, {self.phase}, seed {self.seed}"

    @property
    def key(self) -> tuple[str, str, str, int]:
        return self.target, self.cause, self.phase, self.seed

    @property
    def transition(self) -> Transition | None:
        """What is begun before the fault strikes."""
        if self.phase is Phase.RESTORING:
            return Transition.RESTORE
        return None if self.phase in (Phase.INDEPENDENT, Phase.COOPERATING) else Transition.DROP

    @property
    def load(self) -> LoadKind:
        """Of odd seeds, some requests are sampled by seeds; of the others, all are greedy."""
        return LoadKind(self.gathered, bool(self.seed % 2), self.phase in IN_GROUP)

    @property
    def gathered(self) -> bool:
        """Whether all requests have to be at instances other than the target."""
        return self.target is Target.STAGE

    @property
    def ends_connections(self) -> bool:
        """Whether clients lose theirs, since the router's process ends."""
        return self.target is Target.ROUTER and self.cause in (Cause.KILL, Cause.STOP)


@dataclass(frozen=True, slots=True)
class Gate:
    """Where a process stands still until the fault has struck: at the `nth` reach of `point`.

    With `of_router` it is the router's, else the instance's that suffers or, where the router does,
    that of an owner.
    """

    point: str
    nth: int = 1
    of_router: bool = False


_ROUTER_POINTS = {
    Phase.PREPARING: ("control.prepare", "control.vote"),
    Phase.COMMITTING: ("control.commit",),
}
_MEMBER_POINTS = {
    Phase.PREPARING: ("transition.prepared", "transition.voted"),
    Phase.COMMITTING: (
        "transition.joined",
        "transition.committed",
        "transition.mapped",
        "transition.released",
        "transition.adopted",
    ),
    Phase.EXCHANGING: ("exchange.sent", "exchange.received"),
    Phase.GROWING: ("growth.mapped", "growth.used"),
    Phase.RESTORING: (
        "restore.reserved",
        "transition.compacted",
        "exchange.received",
        "parameters.received",
        "restore.fetched",
        "transition.received",
    ),
}
_MEMBERS = 3


def gate(cell: Cell) -> Gate | None:
    """Where the phase of a cell is met; None where it lasts, so that any moment will do."""
    if cell.transition is None:
        return None
    if cell.target is Target.ROUTER and cell.phase in _ROUTER_POINTS:
        points = _ROUTER_POINTS[cell.phase]
        return Gate(points[cell.seed % len(points)], 1 + cell.seed % _MEMBERS, of_router=True)
    points = _MEMBER_POINTS[cell.phase]
    if cell.phase is Phase.EXCHANGING and cell.target is Target.STAGE:
        points = ("exchange.received",)  # it has nothing to send
    point = points[cell.seed % len(points)]
    in_pieces = point.startswith(("exchange.", "parameters."))
    return Gate(point, 1 + cell.seed // len(points) if in_pieces else 1)


def away(cell: Cell) -> bool:
    """Of a cut one way: whether what the target sends is lost, or else what it is sent."""
    return cell.seed % 2 == 0


def senseless(target: Target, phase: Phase) -> str:
    """Why a cell is not in the matrix; empty if it is."""
    if target is Target.STAGE and phase is Phase.INDEPENDENT:
        return "there are no stages without a group, and an idle instance has nothing to lose"
    return ""


def matrix(
    targets: Iterable[Target] = tuple(Target),
    causes: Iterable[Cause] = tuple(Cause),
    phases: Iterable[Phase] = tuple(Phase),
    seeds: Sequence[int] = (0,),
) -> Iterator[Cell]:
    """All cells that make sense; those of one seed before those of the next.

    Causes go before targets: those that cost the most time come last.
    """
    chosen = tuple(targets), tuple(causes), tuple(phases)
    for seed in seeds:
        for cause in _BY_COST:
            for target, phase in product(chosen[0], chosen[2]):
                if cause in chosen[1] and not senseless(target, phase):
                    yield Cell(target, cause, phase, seed)


_BY_COST = (Cause.KILL, Cause.PAUSE, Cause.BOTH_WAYS, Cause.ONE_WAY, Cause.STOP)


def left_out() -> list[dict[str, str]]:
    """The cells that make no sense, each with its reason."""
    return [
        {"target": target, "phase": phase, "why": why}
        for target, phase in product(Target, Phase)
        if (why := senseless(target, phase))
    ]
