"""ZMQ sockets that carry packets: of members only, where other hosts can reach them."""

from __future__ import annotations

from typing import Any

import zmq
from zmq.auth.thread import ThreadAuthenticator

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

    def inbox(self, address: str) -> zmq.Socket[bytes]:
        """Bound to `address`, which may leave the port open (`tcp://host:*`)."""
        socket: zmq.Socket[bytes] = self._context.socket(zmq.PULL)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt(zmq.LINGER, 0)
        if self._keys is not None:
            self._keys.secure_inbox(socket)
        socket.bind(address)
        return socket

    def outbox(self, address: str) -> zmq.Socket[bytes]:
        """On its way to be connected; belongs to the thread that calls this."""
        socket: zmq.Socket[bytes] = self._context.socket(zmq.PUSH)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.LINGER, 0)
        if self._keys is not None:
            self._keys.secure_outbox(socket)
        socket.connect(address)
        return socket

    def close(self) -> None:
        if self._doorkeeper is not None:
            self._doorkeeper.stop()
