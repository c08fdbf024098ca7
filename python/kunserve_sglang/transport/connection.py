"""One ZMQ connection to a peer that, once it has ended, stays so."""

from __future__ import annotations

import time

import zmq
from zmq.utils.monitor import recv_monitor_message

from kunserve_sglang.core.addresses import is_ipv6
from kunserve_sglang.core.errors import PeerLost

_ENDED = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


class DataConnection:
    """Ordered messages, never again after a gap.

    ZMQ would connect again by itself and leave out what was on its way, and nobody could tell.
    """

    def __init__(self, socket: zmq.Socket[bytes], address: str) -> None:
        """Takes over a socket that is not connected yet."""
        self._socket = socket
        self._address = address
        self._events: zmq.Socket[bytes] = socket.get_monitor_socket(
            _ENDED | zmq.EVENT_HANDSHAKE_SUCCEEDED
        )
        self._open = False
        self._ended = ""
        socket.setsockopt(zmq.RECONNECT_IVL, -1)
        socket.ipv6 = is_ipv6(address)
        socket.connect(address)

    @property
    def ended(self) -> str:
        """Why nothing more arrives at the peer; empty if something may."""
        while not self._ended and _readable(self._events):
            event = recv_monitor_message(self._events)["event"]
            if event & _ENDED:
                self._ended = f"the connection to {self._address} has ended"
            else:
                self._open = True
        return self._ended

    def wait(self, timeout_s: float) -> None:
        """Until it is open. Raises `PeerLost` if no member answers there."""
        deadline = time.monotonic() + timeout_s
        while not self.ended and not self._open:
            left = deadline - time.monotonic()
            if left <= 0:
                raise PeerLost(f"no instance answers at {self._address}")
            self._events.poll(1 + int(1000 * left))
        if self._ended:
            raise PeerLost(f"no instance answers at {self._address}")

    def send(self, frames: list[bytes]) -> None:
        """Never blocks."""
        self._socket.send_multipart(frames, copy=False)

    def receive(self) -> bytes | None:
        """A message that has come back, if any."""
        if _readable(self._socket):
            return self._socket.recv(zmq.NOBLOCK)
        return None

    def close(self) -> None:
        self._socket.disable_monitor()
        self._events.close()
        self._socket.close()


def _readable(socket: zmq.Socket[bytes]) -> bool:
    return bool(int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)
