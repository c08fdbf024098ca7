"""What a member is told to do, step by step, and what comes of it.

A script is a list of `(step, action)`; a step is one forward pass of the member's scheduler, so
that a script means the same every time it is played.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Add:
    """A request arrives."""

    rid: str
    prompt: tuple[int, ...]
    new_tokens: int
    sampling: dict[str, Any] = field(default_factory=dict)
    asks: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Journaled:
    """A stream for a router: from its beginning, or where another instance has left it.

    `records` are those of that instance, a line each, and `delivered` the events that the client
    has. `lost_after` so many events the router ends, and what counts is what the next one gets,
    which asks for the same.
    """

    records: bytes = b""
    delivered: int = 0
    lost_after: int = 0


@dataclass(frozen=True)
class Call:
    """A client calls an endpoint: `generate`, `chat`, `completions` or `messages`.

    Needs a tokenizer. A `journaled` one is a stream, and answered with the events as they go to a
    router.
    """

    rid: str
    endpoint: str
    body: dict[str, Any]
    journaled: Journaled | None = None


@dataclass(frozen=True)
class AbortRequest:
    """A request is aborted, or the client of a call leaves."""

    rid: str


@dataclass(frozen=True)
class Gate:
    """Stand still until the layout has reached this many transitions; tell the test first."""

    name: str


@dataclass(frozen=True)
class Pause:
    """Generation pauses for some turns of the loop, with requests left in place or retracted."""

    mode: str


@dataclass(frozen=True)
class Turns:
    """So many turns of the loop, whether or not a batch runs in them."""

    count: int


@dataclass(frozen=True)
class Break:
    """From now on something fails whenever it has to do with this request: see `faults`."""

    point: str
    rid: str


@dataclass(frozen=True)
class Plant:
    """From now on answers are wrong in this way: see `faults`."""

    fault: str


@dataclass(frozen=True)
class Wedge:
    """SGLang believes from now on that there is no room, and nothing makes it look again."""


Action = Add | Call | AbortRequest | Gate | Pause | Turns | Break | Plant | Wedge


@dataclass(frozen=True)
class Output:
    """An answer; `logprobs` are all that SGLang would send, by the names of its record.

    `end` is what it would say of the reason; `hidden` are hidden states, one row a token.
    `received` is what the client of a call has got, by the number of the choice; all else is empty.
    """

    tokens: tuple[int, ...]
    reason: str
    cached: int
    logprobs: dict[str, Any] = field(default_factory=dict)
    end: dict[str, Any] = field(default_factory=dict)
    hidden: list[Any] = field(default_factory=list)
    received: dict[int, list[Any]] = field(default_factory=dict)
