"""The router's control socket: named messages to and from the instances."""

from __future__ import annotations

from typing import Protocol

import zmq
import zmq.asyncio
from zmq.auth.asyncio import AsyncioAuthenticator
from zmq.utils.monitor import recv_monitor_message

from kunserve_sglang.core.addresses import is_ipv6, with_port
from kunserve_sglang.core.heartbeats import watch_other_end
from kunserve_sglang.core.keys import Admission, ClusterKeys


class ControlLine(Protocol):
    """What carries messages; any of them may get lost, come late, twice or in another order."""

    tcp: str
    """Where instances of other hosts find it; empty if they cannot."""

    async def receive(self) -> tuple[bytes, bytes]:
        """The next message and the name of its sender."""
        ...

    async def send(self, name: bytes, data: bytes) -> bool:
        """False if nobody of this name is connected."""
        ...

    async def ended(self) -> None:
        """Returns when a connection has ended, with its process perhaps."""
        ...

    def close(self) -> None: ...


class ControlSocket:
    """A ROUTER socket, on this host and, for members with keys, on others."""

    def __init__(
        self,
        address: str,
        *,
        tcp: str | None = None,
        known_as: str | None = None,
        keys: ClusterKeys | None = None,
    ) -> None:
        """`address` is for this host, `tcp` for others as well: members only, by `keys`.

        They know the latter as `known_as`, if that is another address for the same port.
        """
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        # A restarted instance takes over the name of the one that died.
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        # Say so when a message is for somebody whose connection has ended.
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        watch_other_end(self._socket)
        self._socket.bind(address)
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.tcp = ""
        self._doorkeeper: AsyncioAuthenticator | None = None
        if tcp is not None and keys is not None:
            self._doorkeeper = AsyncioAuthenticator(self._context)
            self._doorkeeper.start()
            self._doorkeeper.configure_curve_callback(
                "*", credentials_provider=Admission(keys.members)
            )
            keys.secure(self._socket)
            self._socket.ipv6 = is_ipv6(tcp)
            self._socket.bind(tcp)
            bound = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
            self.tcp = with_port(known_as or bound, int(bound.rpartition(":")[2]))
        self._monitor: zmq.asyncio.Socket | None = None

    async def receive(self) -> tuple[bytes, bytes]:
        name, data = await self._socket.recv_multipart()
        return name, data

    async def send(self, name: bytes, data: bytes) -> bool:
        try:
            await self._socket.send_multipart([name, data])
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return False
        return True

    async def ended(self) -> None:
        if self._monitor is None:
            self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        await recv_monitor_message(self._monitor)

    def close(self) -> None:
        if self._monitor is not None:
            self._socket.disable_monitor()
            self._monitor.close(linger=0)
        self._socket.close()
        if self._doorkeeper is not None:
            self._doorkeeper.stop()
        self._context.term()
