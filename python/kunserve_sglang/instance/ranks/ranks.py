"""How the ranks of one instance stay in step (tensor parallelism).

Every rank runs the whole instance on its own shard of each tensor, and collectives tie them to one
another in every layer: all must run the same stage work, transitions and admissions in the same
order, or they would wait for each other for good. What a rank does follows from what it has seen.
So rank 0 alone looks at what is not the same everywhere (the clock, the router, whose packet came
first), and the others take its word at the same place of their program.

Rank 0 does not wait for that: its words are a stream, which the others read as they get there. Only
what a rank has to say to all is collected.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import msgspec
import zmq

from kunserve_sglang.core.errors import InternalError, PeerLost
from kunserve_sglang.core.sockets import PollHandle
from kunserve_sglang.transport.local import LocalDataPlane

T = TypeVar("T")

_POLL_INTERVAL_S = 1.0
_PATIENCE_S = 600.0
"""For a rank that is still loading its part of the model."""

_RING_BYTES = 4096
"""The least there is: what ranks tell each other has no tensors."""


@dataclass(frozen=True, slots=True)
class Fact(Generic[T]):
    """Something that rank 0 finds out for all; `decoder` reads what it has told."""

    name: str
    decoder: msgspec.msgpack.Decoder[T]


class Ranks(Protocol):
    """One rank's view of all ranks of its instance."""

    rank: int
    size: int

    def agree(self, fact: Fact[T], look: Callable[[], T]) -> T:
        """What `look` returns on rank 0, on every rank; it is called nowhere else.

        All ranks call this for the same facts in the same order; raises `InternalError` if not.
        """
        ...

    def gather(self, mine: str) -> tuple[str, ...]:
        """What every rank has to say, by rank. Waits for all."""
        ...

    def connect(self) -> None:
        """To be called once all ranks are there, before anything else."""
        ...

    def close(self) -> None: ...


def open_ranks(path: str, rank: int, size: int) -> Ranks:
    """`path` names the instance's sockets."""
    if size == 1:
        return OneRank()
    return Follower(path, rank, size) if rank else Leader(path, size)


class OneRank:
    """Nobody to agree with."""

    rank = 0
    size = 1

    def connect(self) -> None:
        return None

    def agree(self, fact: Fact[T], look: Callable[[], T]) -> T:  # noqa: ARG002
        return look()

    def gather(self, mine: str) -> tuple[str, ...]:
        return (mine,)

    def close(self) -> None:
        return None


class _Told(msgspec.Struct, frozen=True, array_like=True):
    """Rank 0 to the others: the next fact."""

    fact: str
    value: Any


class _Heard(msgspec.Struct, frozen=True, array_like=True):
    """`_Told` as it is read: the fact says what its value is."""

    fact: str
    value: msgspec.Raw


class _Part(msgspec.Struct, frozen=True, tag="part"):
    """To rank 0: what this rank has to say."""

    rank: int
    text: str


class _Arrived(msgspec.Struct, frozen=True, tag="arrived"):
    """To rank 0: this rank has its part of a peer's packet."""

    rank: int
    header: bytes


_encoder = msgspec.msgpack.Encoder()
_told = msgspec.msgpack.Decoder(_Heard)
_reports: msgspec.msgpack.Decoder[_Part | _Arrived] = msgspec.msgpack.Decoder(_Part | _Arrived)
_PARTS: Fact[tuple[str, ...]] = Fact("parts", msgspec.msgpack.Decoder(tuple[str, ...]))


class Leader:
    """Rank 0: looks, and tells."""

    rank = 0

    def __init__(self, path: str, size: int) -> None:
        self.size = size
        self._channel = LocalDataPlane(_socket(path, 0), ring_bytes=_RING_BYTES)
        self._others = {rank: _socket(path, rank) for rank in range(1, size)}
        self._poller = zmq.Poller()
        for handle in self.poll_handles:
            self._poller.register(handle, zmq.POLLIN)
        self._arrived: list[Counter[bytes]] = [Counter() for _ in range(size)]
        self._parts: list[deque[str]] = [deque() for _ in range(size)]

    def connect(self) -> None:
        self._channel.connect(self._others)

    @property
    def poll_handles(self) -> list[PollHandle]:
        """Readable when another rank has reported something."""
        return self._channel.poll_handles()

    def agree(self, fact: Fact[T], look: Callable[[], T]) -> T:
        value = look()
        record = _encoder.encode(_Told(fact.name, value))
        try:
            for rank in self._others:
                self._channel.send(rank, record)
        except PeerLost as error:
            raise InternalError(f"a rank of this instance is gone: {error}") from error
        # Nothing may be left to send: whoever waits for it cannot take part in a collective.
        while not all(map(self._channel.room, self._others)):
            self._poller.poll(int(1e3 * _POLL_INTERVAL_S))
            self.listen()
        return value

    def gather(self, mine: str) -> tuple[str, ...]:
        self._parts[0].append(mine)
        return self.agree(_PARTS, self._collect)

    def everywhere(self, header: bytes) -> bool:
        """Whether all other ranks have reported this packet; true once for each packet."""
        others = self._arrived[1:]
        if not all(arrived[header] for arrived in others):
            return False
        for arrived in others:
            arrived[header] -= 1
            if not arrived[header]:
                del arrived[header]
        return True

    def listen(self) -> None:
        """Take in what the other ranks have reported."""
        while self._listen():
            continue

    def close(self) -> None:
        self._channel.close()

    def _collect(self) -> tuple[str, ...]:
        deadline = time.monotonic() + _PATIENCE_S
        while not all(self._parts):
            self._listen(_POLL_INTERVAL_S)
            if time.monotonic() > deadline:
                raise InternalError("a rank of this instance does not answer")
        return tuple(parts.popleft() for parts in self._parts)

    def _listen(self, timeout_s: float = 0.0) -> bool:
        """Take one report in; false if none came in time."""
        packet = self._channel.receive(timeout_s)
        if packet is None:
            return False
        report = _reports.decode(packet.header)
        if isinstance(report, _Arrived):
            self._arrived[report.rank][report.header] += 1
        else:
            self._parts[report.rank].append(report.text)
        return True


class Follower:
    """Any other rank: is told, and reports."""

    def __init__(self, path: str, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self._channel = LocalDataPlane(_socket(path, rank), ring_bytes=_RING_BYTES)
        self._leader = {0: _socket(path, 0)}
        self._meanwhile: Callable[[], None] = _nothing
        self._poller = zmq.Poller()
        self._poll_also(self._channel.poll_handles())

    def connect(self) -> None:
        self._channel.connect(self._leader)

    def while_waiting(self, work: Callable[[], None], handles: Sequence[PollHandle]) -> None:
        """Call `work` before every fact, and while one is waited for when a handle is readable."""
        self._meanwhile = work
        self._poll_also(handles)

    def agree(self, fact: Fact[T], look: Callable[[], T]) -> T:  # noqa: ARG002
        self._meanwhile()
        while (packet := self._channel.receive()) is None:
            self._poller.poll(int(1e3 * _POLL_INTERVAL_S))
            self._meanwhile()
        told = _told.decode(packet.header)
        if told.fact != fact.name:
            raise InternalError(f"rank {self.rank} asks for {fact.name}, rank 0 for {told.fact}")
        return fact.decoder.decode(told.value)

    def gather(self, mine: str) -> tuple[str, ...]:
        self._report(_Part(self.rank, mine))
        return self.agree(_PARTS, lambda: ())

    def arrived(self, header: bytes) -> None:
        """This rank's part of a packet is here."""
        self._report(_Arrived(self.rank, header))

    def close(self) -> None:
        self._channel.close()

    def _report(self, report: _Part | _Arrived) -> None:
        try:
            self._channel.send(0, _encoder.encode(report))
        except PeerLost as error:
            raise InternalError(f"rank 0 of this instance is gone: {error}") from error

    def _poll_also(self, handles: Sequence[PollHandle]) -> None:
        for handle in handles:
            self._poller.register(handle, zmq.POLLIN)


def _socket(path: str, rank: int) -> str:
    return f"{path}-rank-{rank}"


def _nothing() -> None:
    return None
