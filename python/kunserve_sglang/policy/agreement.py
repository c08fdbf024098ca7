"""Whether two members of a group run by layouts that go together, and who has to do something.

A decision may have reached one and not the other. What a member reports is all that is looked at,
so it does not matter who has sent the decision, or whether anybody remembers it.
"""

from __future__ import annotations

from enum import Enum, auto

from kunserve_sglang.core.layout import Layout
from kunserve_sglang.core.messages import Transition, TransitionKind


class Agreement(Enum):
    """What a member's layout is beside that of a mate in it."""

    AGREES = auto()
    """The layouts are the same, or the mate has yet to catch up."""
    BEHIND = auto()
    """The mate uses larger capacities, which all had mapped before."""
    OVERTAKEN = auto()
    """The mate has gone on to a layout in which they cannot run together."""
    AHEAD = auto()
    """The mate has stayed behind in one, or what it has reported since is not known yet."""


def agreement(mine: Layout, theirs: Layout) -> Agreement:
    """Of a member that runs by `mine` with one of its mates, which runs by `theirs`."""
    if mine == theirs or _grown(theirs, mine):
        return Agreement.AGREES
    if _grown(mine, theirs):
        return Agreement.BEHIND
    return Agreement.OVERTAKEN if theirs.epoch > mine.epoch else Agreement.AHEAD


def catching_up(mine: Layout, theirs: Layout) -> Transition:
    """The growth that a member that is `BEHIND` has missed."""
    return Transition(epoch=theirs.epoch, kind=TransitionKind.DROP, before=(mine,), after=(theirs,))


def _grown(old: Layout, new: Layout) -> bool:
    return new.epoch > old.epoch and catching_up(old, new).grows
