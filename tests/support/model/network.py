"""Control messages that get lost, come late, twice or in another order; packets that do not."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from kunserve_sglang.core.errors import PeerLost
from kunserve_sglang.transport import Packet
from tests.support.model.clock import Sleeper, VirtualLoop

_USUAL_S = 0.001
_ROOM = 1 << 30
_LATE_S = (0.05, 0.5, 3.0, 15.0)
_TAG_BYTES = 20
"""Where a message says of which kind it is."""

_POLL_S = 0.02
"""Whoever polls more often than that would only take time to simulate."""


class Weather:
    """What happens to a message; drawn from one seed for a whole run."""

    def __init__(self, loop: VirtualLoop, chance: random.Random) -> None:
        self.loop = loop
        self.chance = chance
        self._cut: dict[tuple[bytes, bytes], float] = {}
        self.clear_up()

    def break_up(self) -> None:
        """From now on anything may happen."""
        self.loss = self.chance.choice((0.0, 0.0, 0.1, 0.4))
        self.late = self.chance.choice((0.0, 0.1, 0.4))
        self.twice = self.chance.choice((0.0, 0.1, 0.3))

    def clear_up(self) -> None:
        """From now on all messages arrive, once and soon; those that are late still come."""
        self.loss = self.late = self.twice = 0.0
        self._cut.clear()

    def cut(self, way: bytes, kind: bytes, seconds: float) -> None:
        """All messages of a kind, or of all, that go this way get lost for so long."""
        self._cut[way, kind] = self.loop.time() + seconds

    def carry(self, way: bytes, data: bytes, deliver: Callable[[], None]) -> None:
        """One control message, on its way to the router or to a member."""
        chance = self.chance
        for (cut, kind), until in self._cut.items():
            if until > self.loop.time() and way.startswith(cut) and kind in data[:_TAG_BYTES]:
                return
        for _ in range(2 if chance.random() < self.twice else 1):
            if chance.random() >= self.loss:
                late = chance.random() < self.late
                longest = chance.choice(_LATE_S) if late else _USUAL_S
                self.loop.call_later(chance.random() * longest, deliver)


class RouterLine:
    """A `control.control_socket.ControlLine` to the members of a model."""

    tcp = ""

    def __init__(self, weather: Weather) -> None:
        self._weather = weather
        self._inbox: asyncio.Queue[tuple[bytes, bytes]] = asyncio.Queue()
        self._ended = asyncio.Event()
        self.members: dict[bytes, MemberSocket] = {}

    async def receive(self) -> tuple[bytes, bytes]:
        return await self._inbox.get()

    async def send(self, name: bytes, data: bytes) -> bool:
        member = self.members.get(name)
        if member is None:
            return False
        self._weather.carry(b"to " + name, data, lambda: member.deliver(data))
        return True

    async def ended(self) -> None:
        await self._ended.wait()
        self._ended.clear()

    def take(self, name: bytes, data: bytes) -> None:
        """A message of a member."""
        self._weather.carry(b"from " + name, data, lambda: self._inbox.put_nowait((name, data)))

    def hang_up(self, name: bytes) -> None:
        """The member's process has ended."""
        self.members.pop(name, None)
        self._ended.set()

    def close(self) -> None:
        self.members.clear()


class MemberSocket:
    """In place of a `zmq.Socket`, and of the context that makes it; for a `ControlLink`."""

    def __init__(self, name: bytes, router: Callable[[], RouterLine], sleeper: Sleeper) -> None:
        self._name = name
        self._router = router
        self._sleeper = sleeper
        self._inbox: deque[bytes] = deque()

    def socket(self, _kind: int) -> MemberSocket:
        return self

    def setsockopt(self, _option: int, _value: Any) -> None:
        """There are no options."""

    def connect(self, _address: str) -> None:
        """It is, to whatever router there is."""

    def send(self, data: bytes) -> None:
        line = self._router()
        line.members[self._name] = self
        line.take(self._name, data)

    def poll(self, timeout_ms: int) -> bool:
        if not self._inbox and timeout_ms:
            self._sleeper.sleep(max(_POLL_S, timeout_ms / 1e3))
        return bool(self._inbox)

    def recv(self) -> bytes:
        return self._inbox.popleft()

    def deliver(self, data: bytes) -> None:
        self._inbox.append(data)
        self._sleeper.wake()

    def close(self) -> None:
        self._inbox.clear()


class ModelPlane:
    """A `transport.DataPlane`: packets of one sender arrive, in order, as long as both live."""

    def __init__(
        self, number: int, planes: dict[int, ModelPlane], weather: Weather, sleeper: Sleeper
    ) -> None:
        self.address = f"data-{number}"
        self._number = number
        self._planes = planes
        self._weather = weather
        self._sleeper = sleeper
        self._peers: frozenset[int] = frozenset()
        self._inbox: deque[Packet] = deque()
        self._last: dict[int, float] = {}
        planes[number] = self

    def connect(self, peers: Mapping[int, str]) -> None:
        if not peers.keys() <= self._planes.keys():
            raise PeerLost(f"{sorted(peers)} are not all there")
        self._peers = frozenset(peers)

    @property
    def malformed(self) -> int:
        return 0

    def send(
        self,
        peer: int,
        header: bytes,
        tensors: Sequence[torch.Tensor] = (),
        *,
        bulk: bool = False,  # noqa: ARG002 (all is fast here)
    ) -> None:
        assert peer in self._peers, f"instance {peer} is not connected"
        target = self._planes.get(peer)
        if target is None:
            raise PeerLost(f"instance {peer} is not there")
        loop = self._weather.loop
        at = max(self._last.get(peer, 0.0), loop.time()) + _USUAL_S * self._weather.chance.random()
        self._last[peer] = at
        packet = Packet(header, [t.clone() for t in tensors])
        loop.call_at(at, lambda: target.deliver(packet))

    def deliver(self, packet: Packet) -> None:
        self._inbox.append(packet)
        self._sleeper.wake()

    def room(self, _peer: int) -> int:
        return _ROOM

    def window(self, _peer: int) -> int:
        return _ROOM

    def lost(self, peers: Collection[int]) -> str:
        gone = sorted(set(peers) - self._planes.keys())
        return f"instances {gone} are not there" if gone else ""

    def receive(self, timeout_s: float = 0.0) -> Packet | None:
        if not self._inbox and timeout_s > 0:
            self._sleeper.sleep(max(_POLL_S, timeout_s))
        return self._inbox.popleft() if self._inbox else None

    def poll_handles(self) -> list[Any]:
        return []

    def close(self) -> None:
        self._planes.pop(self._number, None)
