"""ZMQ sockets that carry packets: of members only, where other hosts can reach them."""

from __future__ import annotations

from typing import Any

import zmq
from zmq.auth.thread import ThreadAuthenticator

from kunserve_sglang.core.addresses import is_ipv6
from kunserve_sglang.core.heartbeats import watch_packets
from kunserve_sglang.core.keys import Admission, MemberKeys


class PacketSockets:
    """Makes inboxes and outboxes that never block a sender; what bounds a queue is the protocol.

    With keys, the thread that checks who connects wakes for that alone.
    """

    def __init__(self, context: zmq.Context[Any], keys: MemberKeys | None) -> None:
        """`context` must have no other sockets with keys: it takes one checker of them."""
        self._context = context
        self._keys = keys
        self._doorkeeper: ThreadAuthenticator | None = None
        if keys is not None:
            self._doorkeeper = ThreadAuthenticator(context)
            self._doorkeeper.start()
            self._doorkeeper.configure_curve_callback("*", credentials_provider=Admission(keys))

    def inbox(self, address: str, kind: int = zmq.PULL, max_bytes: int = -1) -> zmq.Socket[bytes]:
        """Bound to `address`, which may leave the port open (`tcp://host:*`).

        Whoever sends a part of more than `max_bytes` bytes is cut off.
        """
        socket = self._socket(kind)
        socket.setsockopt(zmq.MAXMSGSIZE, max_bytes)
        if self._keys is not None:
            self._keys.secure_inbox(socket)
        socket.ipv6 = is_ipv6(address)
        socket.bind(address)
        return socket

    def outbox(self, kind: int = zmq.PUSH) -> zmq.Socket[bytes]:
        """To be connected by the thread that calls this, to which it belongs."""
        socket = self._socket(kind)
        if self._keys is not None:
            self._keys.secure_outbox(socket)
        return socket

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self._context.socket(kind)
        for option in (zmq.RCVHWM, zmq.SNDHWM, zmq.LINGER):
            socket.setsockopt(option, 0)
        watch_packets(socket)
        return socket

    def close(self) -> None:
        if self._doorkeeper is not None:
            self._doorkeeper.stop()
