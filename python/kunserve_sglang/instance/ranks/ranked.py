"""What an instance of several ranks sees of the outside: the same on all of them.

Rank r exchanges packets with rank r of the peers; rank 0 alone talks to the router.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import msgspec
import zmq

from kunserve_sglang.core.errors import InternalError, PeerLost
from kunserve_sglang.core.messages import ToInstance, ToRouter
from kunserve_sglang.core.sockets import PollHandle
from kunserve_sglang.instance.packets import wire
from kunserve_sglang.instance.parts.control import Control
from kunserve_sglang.instance.ranks.ranks import Fact, Follower, Leader, Ranks
from kunserve_sglang.transport import DataPlane, Packet, Tensors


class _Arrival(msgspec.Struct, frozen=True, array_like=True):
    """The packet to go on with, by its header, if any; or why none will ever come."""

    header: bytes | None
    lost: str = ""


_TIME = Fact("the time", msgspec.msgpack.Decoder(float))
_ROOM = Fact("room", msgspec.msgpack.Decoder(int))
_ARRIVAL = Fact("a packet", msgspec.msgpack.Decoder(_Arrival))
_COMMAND: Fact[ToInstance | None] = Fact("a command", msgspec.msgpack.Decoder(ToInstance | None))
_LOSS = Fact("a loss", msgspec.msgpack.Decoder(str))


def clock_of(ranks: Ranks) -> Callable[[], float]:
    """Monotonic seconds, as `time.monotonic`, by which all ranks decide alike."""
    return time.monotonic if ranks.size == 1 else partial(ranks.agree, _TIME, time.monotonic)


class RankedControl:
    """The router's link of an instance of several ranks; those without a `link` only obey."""

    def __init__(self, link: Control | None, ranks: Ranks) -> None:
        self._link: Any = link  # asked on rank 0 alone, which has one
        self._ranks = ranks

    @property
    def malformed(self) -> int:
        return self._link.malformed if self._link else 0

    @property
    def poll_handles(self) -> list[PollHandle]:
        return self._link.poll_handles if self._link else []

    def send(self, message: ToRouter) -> None:
        if self._link:
            self._link.send(message)

    def receive(self, timeout_s: float = 0.0) -> ToInstance | None:
        return self._ranks.agree(_COMMAND, lambda: self._link.receive(timeout_s))

    def check_for_losses(self, epoch: int) -> None:
        if reason := self._ranks.agree(_LOSS, lambda: self._loss(epoch)):
            raise PeerLost(reason)

    def close(self) -> None:
        if self._link:
            self._link.close()

    def _loss(self, epoch: int) -> str:
        """On rank 0: what the router has said of it."""
        try:
            self._link.check_for_losses(epoch)
        except PeerLost as error:
            return str(error)
        return ""


def ranked_control(open_link: Callable[[], Control], ranks: Ranks) -> Control:
    """The router's link itself where an instance has but one rank."""
    link = open_link() if ranks.rank == 0 else None
    return link if link and ranks.size == 1 else RankedControl(link, ranks)


class RankedPlane:
    """The data plane of one rank: a `transport.DataPlane` whose packets all ranks see alike.

    A packet has arrived when its part is there on every rank; all then get it at the same place of
    their program. The parts of a packet have one header, since all ranks of its sender agree on
    what they put into it.
    """

    def __init__(self, plane: DataPlane, ranks: Leader | Follower) -> None:
        self._plane = plane
        self._ranks = ranks
        self.address = msgspec.json.encode(ranks.gather(plane.address)).decode()
        self._parts: deque[tuple[wire.Envelope, Packet]] = deque()
        self._newest = self._ended = 0
        self._lost = ""

    @property
    def malformed(self) -> int:
        return self._plane.malformed

    def connect(self, peers: Mapping[int, str]) -> None:
        if not peers:
            # Nothing that was on its way to a group matters after it. Parts of packets that did
            # not reach all ranks would be kept for good.
            self._ended = self._newest
            self._parts = deque(p for p in self._parts if p[0].epoch > self._ended)
        rank = self._ranks.rank
        self._lost = error = ""
        try:
            self._plane.connect({peer: _addresses(text)[rank] for peer, text in peers.items()})
        except PeerLost as reason:
            error = str(reason)
        if errors := [text for text in self._ranks.gather(error) if text]:
            raise PeerLost(errors[0])

    def send(self, peer: int, header: bytes, tensors: Tensors = (), *, bulk: bool = False) -> None:
        try:
            self._plane.send(peer, header, tensors, bulk=bulk)
        except PeerLost as error:
            self._lost = str(error)  # to be raised when all ranks can hear of it

    def room(self, peer: int) -> int:
        return self._ranks.agree(_ROOM, lambda: self._plane.room(peer))

    def window(self, peer: int) -> int:
        return self._plane.window(peer)  # of all ranks alike, by their settings

    def lost(self, peers: Collection[int]) -> str:
        return self._ranks.agree(_LOSS, lambda: self._plane.lost(peers))

    def receive(self, timeout_s: float = 0.0) -> Packet | None:
        arrival = self._ranks.agree(_ARRIVAL, lambda: self._look(timeout_s))
        if arrival.lost:
            raise PeerLost(arrival.lost)
        return self._take(arrival.header) if arrival.header is not None else None

    def poll_handles(self) -> list[PollHandle]:
        return self._plane.poll_handles()

    def close(self) -> None:
        self._plane.close()

    def _look(self, timeout_s: float) -> _Arrival:
        """On rank 0: what comes next."""
        raise NotImplementedError

    def _take(self, header: bytes) -> Packet:
        """A part that is here, as it was reported."""
        for index, (envelope, packet) in enumerate(self._parts):
            if packet.header == header:
                del self._parts[index]
                self._newest = max(self._newest, envelope.epoch)
                return packet
        raise InternalError(f"rank {self._ranks.rank} has no part of {wire.decode(header)}")

    def _take_in(self) -> list[bytes]:
        """Keep the parts that have come since; returns their headers.

        Of one that is spoilt on another rank than the first, all wait until the peer timeout.
        """
        came = []
        while (packet := self._next_part()) is not None:
            envelope = wire.envelope(packet.header)
            if envelope.epoch > self._ended:
                self._parts.append((envelope, packet))
                came.append(packet.header)
        return came

    def _next_part(self) -> Packet | None:
        try:
            return self._plane.receive()
        except PeerLost as error:
            self._lost = str(error)  # to be raised when all ranks can hear of it
            return None


class LeadingPlane(RankedPlane):
    """Rank 0's."""

    def __init__(self, plane: DataPlane, ranks: Leader) -> None:
        super().__init__(plane, ranks)
        self._leader = ranks
        self._poller = zmq.Poller()
        for handle in self.poll_handles():
            self._poller.register(handle, zmq.POLLIN)

    def poll_handles(self) -> list[PollHandle]:
        return [*self._plane.poll_handles(), *self._leader.poll_handles]

    def _look(self, timeout_s: float) -> _Arrival:
        deadline = time.monotonic() + timeout_s
        while not self._lost:
            self._take_in()
            self._leader.listen()
            for _, packet in self._parts:
                if self._leader.everywhere(packet.header):
                    return _Arrival(packet.header)
            if self._lost:
                break  # nothing may come any more that would end a wait
            left = deadline - time.monotonic()
            if left <= 0:
                return _Arrival(None)
            self._poller.poll(math.ceil(1e3 * left))
        reason, self._lost = self._lost, ""
        return _Arrival(None, reason)


class FollowingPlane(RankedPlane):
    """Any other rank's: takes packets in whenever it waits for rank 0, and reports them."""

    def __init__(self, plane: DataPlane, ranks: Follower) -> None:
        super().__init__(plane, ranks)
        self._follower = ranks
        ranks.while_waiting(self._report, plane.poll_handles())

    def _report(self) -> None:
        for header in self._take_in():
            self._follower.arrived(header)


def ranked_plane(plane: DataPlane, ranks: Ranks) -> DataPlane:
    """`plane` itself where an instance has but one rank."""
    if isinstance(ranks, Leader):
        return LeadingPlane(plane, ranks)
    return FollowingPlane(plane, ranks) if isinstance(ranks, Follower) else plane


def _addresses(text: str) -> list[str]:
    """Of all ranks of a peer."""
    return msgspec.json.decode(text, type=list[str])
