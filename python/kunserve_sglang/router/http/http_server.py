"""The router's HTTP server: its listening socket, and an eye on those who connect to it."""

from __future__ import annotations

import asyncio
import socket
import ssl

from kunserve_sglang.router.http.inbound import ClientConnection, Clients, Handler
from kunserve_sglang.router.http.limits import Limits

_CANCEL_S = 0.5


class HttpServer:
    """Accepts connections and runs `handler`, one task a request."""

    def __init__(self, handler: Handler, limits: Limits | None = None) -> None:
        self._clients = Clients(handler, limits or Limits())
        self._servers: list[asyncio.Server] = []

    async def start(
        self, listener: socket.socket, backlog: int, tls: ssl.SSLContext | None = None
    ) -> None:
        """`listener` is a bound socket, which others may hold as well."""
        clients = self._clients
        self._listener = listener.dup()
        server = await clients.loop.create_server(
            lambda: ClientConnection(clients), sock=listener, backlog=backlog, ssl=tls
        )
        self._servers.append(server)
        self._sweep()

    async def listen_for_launcher(self, path: str) -> None:
        """At a socket of this host too, in plain HTTP."""
        clients = self._clients
        server = await clients.loop.create_unix_server(lambda: ClientConnection(clients), path)
        self._servers.append(server)

    async def stop(self, grace_s: float) -> None:
        """Take no more requests; those under way have `grace_s`, then they are cancelled."""
        for server in self._servers:
            server.close()
        # Whoever holds the socket as well accepts nothing: clients are refused, not kept waiting.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._sweeping.cancel()
        connections, tasks = self._clients.connections, self._clients.tasks
        for connection in list(connections):
            connection.finish()
        if tasks:
            await asyncio.wait(tasks, timeout=grace_s)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_CANCEL_S)
        for connection in list(connections):
            connection.transport.close()

    def _sweep(self) -> None:
        clients = self._clients
        now = clients.loop.time()
        for connection in list(clients.connections):
            connection.sweep(now)
        self._sweeping = clients.loop.call_later(clients.limits.sweep_s, self._sweep)
