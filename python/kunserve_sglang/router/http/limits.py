"""What clients may make the router keep in memory, and how long they may take."""

from __future__ import annotations

import resource
import socket
from dataclasses import dataclass, field

_MIN_CONNECTIONS = 64


def _connections_per_address() -> int:
    """A request takes two sockets, and half of all files are to be left to the other addresses."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(_MIN_CONNECTIONS, files // 4)


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes and seconds.

    `head` is for a request line with its headers; so much may surround a body as well, in chunk
    sizes and trailers. `all_bodies` are those of requests that are being read or have no whole
    answer yet. `quiet_s` is above what HTTP clients keep idle connections for, so that it is they
    who close them. Whoever sends a request, or takes an answer, has to move `step` bytes in
    `stalled_s`: one byte now and then keeps nothing. `unsent` is what the kernel may hold for one
    client that it cannot send yet; by itself it would take megabytes.
    """

    head: int = 64 << 10
    headers: int = 128
    body: int = 64 << 20
    all_bodies: int = 1 << 30
    connections_per_address: int = field(default_factory=_connections_per_address)
    quiet_s: float = 75.0
    stalled_s: float = 60.0
    step: int = 32 << 10
    unsent: int = 128 << 10
    sweep_s: float = 5.0

    def bound(self, connection: socket.socket) -> None:
        """What the kernel keeps for one client's connection, which is one of TCP."""
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, self.unsent)


class Pace:
    """Whether bytes go on moving: `step` of them in every `limit_s`."""

    __slots__ = ("_bytes", "_since")

    def __init__(self, now: float, moved: int) -> None:
        self._since = now
        self._bytes = moved

    def stalled(self, now: float, moved: int, limits: Limits) -> bool:
        """`moved` bytes in all until now; it only grows."""
        if moved - self._bytes >= limits.step:
            self._since, self._bytes = now, moved
        return now - self._since > limits.stalled_s
