"""The states of a member, what can happen in each of them, and what is to be done then."""

from __future__ import annotations

from enum import StrEnum, auto
from typing import NamedTuple


class MemberState(StrEnum):
    """What a member is doing, or does next.

    No member is ever `AT_REST`: as a target it stands for whichever of the first four fits what
    the machine remembers.
    """

    INDEPENDENT = auto()
    COOPERATIVE = auto()
    FOLLOWING = auto()
    """In the new layout, while KV still follows its layers."""
    FETCHING = auto()
    """Cooperative, with what the next layouts need on its way here, or here already."""
    VOTED = auto()
    EXCHANGING = auto()
    RECOVERING = auto()
    """Layers are missing, and there is no group to run with until the router has spoken."""
    AT_REST = auto()


class MemberEvent(StrEnum):
    """What can happen to a member.

    An `UNKNOWN` message is late, repeated, or about an epoch in which this member takes no part.
    """

    # What a message means (`Machine.meaning_of`), or what came of a `Prepare`.
    GROWTH_PREPARED = auto()
    PREPARED = auto()
    PREPARED_AGAIN = auto()
    """What this member has voted for already is asked again."""
    OBJECTED = auto()
    FETCHED_IN_VAIN = auto()
    COMMITTED = auto()
    GROWTH_COMMITTED = auto()
    COMMITTED_AGAIN = auto()
    """This member runs by that layout already: its answer got lost, or is still to come."""
    UNKNOWN_COMMIT = auto()
    ABORTED = auto()
    GROWTH_ABORTED = auto()
    FETCH_ABORTED = auto()
    UNKNOWN_ABORT = auto()
    LOST = auto()
    UNKNOWN_LOSS = auto()
    # What this member notices by itself.
    OVERTAKEN = auto()
    """Data of a peer that has committed came before the router's decision."""
    UNDECIDED = auto()
    EXCHANGED = auto()
    TIMED_OUT = auto()
    ARRIVED = auto()
    PEER_LOST = auto()
    RECOVERED = auto()


class Action(StrEnum):
    """What a member does; `participant.py` says how."""

    VOTE_YES = auto()
    VOTE_NO = auto()
    ACKNOWLEDGE = auto()
    REFUSE = auto()
    REPEAT = auto()
    """Tell the router again how a transition has ended, or that it will be told."""
    ANSWER = auto()
    """Tell the router that all is done, unless something is still on its way."""
    REFUSE_PENDING = auto()
    UNMAP_GROWTH = auto()
    USE_GROWTH = auto()
    EXCHANGE = auto()
    ADOPT = auto()
    RELEASE_LEFT = auto()
    CANCEL_FETCH = auto()
    LEAVE_GROUP = auto()
    RELOAD = auto()
    PUBLISH = auto()


class TransitionStep(NamedTuple):
    """The next state, and what is to be done in it, in this order."""

    target: MemberState
    actions: tuple[Action, ...] = ()


S, E, A = MemberState, MemberEvent, Action

_ABANDON = (A.CANCEL_FETCH, A.REFUSE_PENDING)
_GIVE_UP = (A.REFUSE_PENDING, A.LEAVE_GROUP, A.PUBLISH)
_ADOPT = (A.ADOPT, A.PUBLISH, A.ANSWER)

_UNKNOWN = {
    E.UNKNOWN_COMMIT: TransitionStep(S.AT_REST, (A.REFUSE,)),
    E.UNKNOWN_ABORT: TransitionStep(S.AT_REST, (A.ACKNOWLEDGE,)),
    E.UNKNOWN_LOSS: TransitionStep(S.AT_REST),
}
_SERVING = _UNKNOWN | {
    E.COMMITTED_AGAIN: TransitionStep(S.AT_REST, (A.REPEAT,)),
    E.OBJECTED: TransitionStep(S.AT_REST, (A.VOTE_NO,)),
    E.PEER_LOST: TransitionStep(S.RECOVERING, _GIVE_UP),
}
_ABLE = _SERVING | {
    E.PREPARED: TransitionStep(S.VOTED, (A.VOTE_YES, A.PUBLISH)),
    E.GROWTH_PREPARED: TransitionStep(S.AT_REST, (A.VOTE_YES,)),
    E.GROWTH_COMMITTED: TransitionStep(S.AT_REST, (A.USE_GROWTH, A.PUBLISH, A.ACKNOWLEDGE)),
    E.GROWTH_ABORTED: TransitionStep(S.AT_REST, (A.UNMAP_GROWTH, A.ACKNOWLEDGE)),
}
_LOST = {E.LOST: TransitionStep(S.RECOVERING, (*_GIVE_UP, A.RELOAD))}

TABLE: dict[MemberState, dict[MemberEvent, TransitionStep]] = {
    S.INDEPENDENT: _ABLE,
    S.COOPERATIVE: _ABLE | _LOST,
    S.FETCHING: _ABLE
    | _LOST
    | {
        E.FETCHED_IN_VAIN: TransitionStep(S.AT_REST, _ABANDON),
        E.FETCH_ABORTED: TransitionStep(S.AT_REST, (*_ABANDON, A.ACKNOWLEDGE)),
        E.ARRIVED: TransitionStep(S.AT_REST, (A.PUBLISH, A.ANSWER)),
    },
    S.FOLLOWING: _SERVING
    | _LOST
    | {E.ARRIVED: TransitionStep(S.AT_REST, (A.RELEASE_LEFT, A.PUBLISH, A.ANSWER))},
    S.VOTED: {
        E.COMMITTED: TransitionStep(S.EXCHANGING, (A.REFUSE_PENDING, A.EXCHANGE)),
        E.OVERTAKEN: TransitionStep(S.EXCHANGING, (A.REFUSE_PENDING, A.EXCHANGE)),
        E.ABORTED: TransitionStep(S.AT_REST, (A.ACKNOWLEDGE, A.PUBLISH)),
        E.UNDECIDED: TransitionStep(S.AT_REST, (A.PUBLISH,)),
        E.PEER_LOST: TransitionStep(S.RECOVERING, _GIVE_UP),
        E.PREPARED_AGAIN: TransitionStep(S.VOTED, (A.VOTE_YES,)),
        E.UNKNOWN_COMMIT: TransitionStep(S.VOTED, (A.REFUSE,)),
        E.UNKNOWN_ABORT: TransitionStep(S.VOTED, (A.ACKNOWLEDGE,)),
        # The router repeats LOST and COMMIT, and waits for one decision as this member does.
        E.LOST: TransitionStep(S.VOTED),
        E.UNKNOWN_LOSS: TransitionStep(S.VOTED),
        E.COMMITTED_AGAIN: TransitionStep(S.VOTED, (A.REPEAT,)),
    },
    S.EXCHANGING: {  # reads no commands
        E.EXCHANGED: TransitionStep(S.AT_REST, _ADOPT),
        E.TIMED_OUT: TransitionStep(S.AT_REST, (A.REFUSE_PENDING, A.PUBLISH)),
        E.PEER_LOST: TransitionStep(S.RECOVERING, _GIVE_UP),
    },
    S.RECOVERING: {
        E.OBJECTED: TransitionStep(S.RECOVERING, (A.VOTE_NO,)),
        E.UNKNOWN_COMMIT: TransitionStep(S.RECOVERING, (A.REFUSE,)),
        E.UNKNOWN_ABORT: TransitionStep(S.RECOVERING, (A.ACKNOWLEDGE,)),
        E.UNKNOWN_LOSS: TransitionStep(S.RECOVERING),
        E.PEER_LOST: TransitionStep(S.RECOVERING, _GIVE_UP),
        E.LOST: TransitionStep(S.RECOVERING, (A.RELOAD,)),
        E.RECOVERED: TransitionStep(S.INDEPENDENT, (A.ADOPT, A.PUBLISH)),
    },
}

OBJECTIONS = {
    S.RECOVERING: "its group has come apart",
    S.FOLLOWING: "an exchange is still under way",
}
"""States in which no transition can begin, and what the router is told then."""
