"""One router: control plane, health watch and HTTP server in one event loop."""

from __future__ import annotations

import asyncio
import logging
import socket

import zmq

from kunserve_sglang.control.control_plane import ControlPlane
from kunserve_sglang.control.health import HealthWatch
from kunserve_sglang.control.upstream import open_session
from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.core.settings import ClusterConfig
from kunserve_sglang.router.app import build_app
from kunserve_sglang.router.http.inbound import HttpServer
from kunserve_sglang.router.http.outbound import InstanceConnections
from kunserve_sglang.router.proxy.traffic import Traffic
from kunserve_sglang.router.settings import RouterConfig

logger = logging.getLogger(__name__)

_GRACE_S = 2
"""How long answers may go on after a stop was asked for; the router ends within a second more."""

_BACKLOG = 4096


def listen(config: ClusterConfig) -> socket.socket:
    """The listening socket; raises `ConfigurationError` if the address cannot be had."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ConfigurationError(
            f"cannot listen on {config.host}:{config.port}: {error.strerror or error}"
        ) from error


async def serve(config: RouterConfig, listener: socket.socket, stop: asyncio.Event) -> None:
    """Run until `stop` is set; answers under way get a short grace, then they are cut.

    Raises `ConfigurationError` if the control address cannot be had.
    """
    try:
        control = ControlPlane(config.cluster, config.control_address, config.keys)
    except zmq.ZMQError as error:
        where = config.cluster.control_address or config.control_address
        raise ConfigurationError(f"cannot bind {where}: {error}") from error
    traffic = control.front = Traffic(control.registry, config.cluster)
    try:
        connections = InstanceConnections()
        async with open_session() as session, asyncio.TaskGroup() as tasks:
            app = build_app(config, control, traffic, session, connections)
            http = HttpServer(app)
            watch = HealthWatch(control.registry, session, config.api_key)
            background = [tasks.create_task(control.run()), tasks.create_task(watch.run())]
            await http.start(listener, _BACKLOG)
            logger.info("router at http://%s:%d", *listener.getsockname()[:2])
            await stop.wait()
            traffic.queue.close()
            await http.stop(_GRACE_S)
            await app.close()
            connections.close()
            for task in background:
                task.cancel()
    finally:
        control.close()
