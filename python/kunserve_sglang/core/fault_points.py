"""Where faults can be made to happen on purpose (`core/faults.py`), and which make sense there.

A point of a step lies between two changes of a process. Where a message or a piece is in hand, it
may be lost as well; one bit may be flipped only where a checksum would notice it, by a receiver
that goes by `SharedSettings.checksums`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class FaultKind(StrEnum):
    """What happens at a point."""

    CRASH = "crash"
    """The process ends at once, as by SIGKILL."""

    HANG = "hang"
    """It stands still for good, with all its connections open."""

    DELAY = "delay"
    """It stands still for some seconds; `delay=0.5` says for how many."""

    DROP = "drop"
    """The message is not sent, or not heard."""

    CORRUPT = "corrupt"
    """One bit of it is flipped."""


_STEP = (FaultKind.CRASH, FaultKind.HANG, FaultKind.DELAY)
_MESSAGE = (*_STEP, FaultKind.DROP)
_PIECE = (*_MESSAGE, FaultKind.CORRUPT)


@dataclass(frozen=True, slots=True)
class Point:
    """`about` says, for people, what has happened there and what has not."""

    about: str
    kinds: tuple[FaultKind, ...] = _STEP


ROUTER_POINTS = {
    "control.prepare": Point("a plan is about to be sent to a member", _MESSAGE),
    "control.vote": Point("the vote of a member has arrived", _MESSAGE),
    "control.commit": Point("a decision is about to be sent to a member", _MESSAGE),
    "control.done": Point("what a member says of a decision has arrived", _MESSAGE),
    "control.abort": Point("a member is about to be told to give a plan up", _MESSAGE),
    "control.lost": Point("a survivor is about to be told that its group is no more", _MESSAGE),
    "control.status": Point("a report of an instance has arrived", _MESSAGE),
    "control.ended": Point("a transition has ended, and is in no list of events"),
    "proxy.sent": Point(
        "a request is about to go to an instance; drop: its connection ends instead", _MESSAGE
    ),
    "proxy.relayed": Point(
        "a part of an answer has come, and not gone on; drop: its connection ends there",
        _MESSAGE,
    ),
}

INSTANCE_POINTS = {
    # The router's messages and the answers to them.
    "member.prepare": Point("a plan has arrived", _MESSAGE),
    "member.vote": Point("a vote is about to be sent", _MESSAGE),
    "member.commit": Point("a decision has arrived", _MESSAGE),
    "member.done": Point("the end of a transition here is about to be reported", _MESSAGE),
    "member.abort": Point("word to give a plan up has arrived", _MESSAGE),
    "member.lost": Point("word that the group is no more has arrived", _MESSAGE),
    "member.status": Point("a report is about to be sent", _MESSAGE),
    # Every transition for which the members stand still: drop, both ends of a restore, rebalance.
    "transition.prepared": Point("a plan is found good and its members connected; no vote yet"),
    "transition.voted": Point("a vote for a plan, or a growth, is given, and a decision due"),
    "transition.committed": Point("the decision is known, and nothing changed"),
    "transition.aborted": Point("a plan is given up, and the router not told"),
    "transition.joined": Point("all members have reached the barrier, and nothing has changed"),
    "transition.compacted": Point("slots above the new capacity are moved into lower ones"),
    "transition.released": Point("pages that are not needed any more are given back"),
    "transition.received": Point("a switch: parameters and KV are here, and not in use"),
    "transition.mapped": Point("the new capacity is mapped; the layout is still the old one"),
    "transition.adopted": Point("the new layout is in use, or that of before; nobody told"),
    # What goes on after a drop.
    "transition.followed": Point("KV has followed its layers; what it has left is still mapped"),
    "growth.mapped": Point("memory that KV had occupied twice is mapped anew; no vote yet"),
    "growth.used": Point("memory that was mapped anew is in use, and the router not told"),
    # What goes on between the two ends of a restore.
    "restore.reserved": Point("room is made and mapped for what is to be fetched ahead"),
    "restore.fetched": Point("all that was to be fetched is here, and the router not told"),
    "restore.given_up": Point("what was fetched is forgotten, and the router not told"),
    # The loss of a member.
    "recovery.left": Point("the group is given up, its requests are queued again; nobody told"),
    "recovery.begun": Point("dropped layers are to be read again, and nothing is changed"),
    "recovery.reloaded": Point("all layers are here again; the layout is still that of the group"),
    # Between members.
    "barrier.sent": Point("the own slots are about to be told to a peer", _PIECE),
    "barrier.received": Point("those of a peer have arrived", _PIECE),
    "exchange.sent": Point("a piece of KV is about to leave", _PIECE),
    "exchange.received": Point("a piece of KV has arrived", _PIECE),
    "parameters.sent": Point("a piece of a layer's parameters is about to leave", _PIECE),
    "parameters.received": Point("a piece of a layer's parameters has arrived", _PIECE),
    "pipeline.sent": Point("a micro-batch is about to leave for the next stage", _MESSAGE),
    "pipeline.received": Point("a micro-batch has arrived", _MESSAGE),
    "pipeline.computed": Point("the own layers have run a peer's micro-batch; it goes on next"),
}

POINTS = {**ROUTER_POINTS, **INSTANCE_POINTS}
