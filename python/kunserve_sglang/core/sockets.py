"""What sockets and polling are to type checkers, which `zmq` leaves open."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import zmq  # the command line reads `core.keys`, and starts without it

AnySocket: TypeAlias = "zmq.Socket[Any]"
"""For threads or for asyncio."""

PollHandle: TypeAlias = "AnySocket | int"
"""What a `zmq.Poller` can wait on: a socket of ZMQ's, or a file descriptor."""
