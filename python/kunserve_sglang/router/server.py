"""One router: control plane, health watch and HTTP server in one event loop."""

from __future__ import annotations

import asyncio
import logging
import socket
from pathlib import Path

import zmq

from kunserve_sglang.control.control_plane import ControlPlane
from kunserve_sglang.control.control_socket import ControlSocket
from kunserve_sglang.control.health import HealthWatch
from kunserve_sglang.control.liveness import LivenessState
from kunserve_sglang.control.registry import Registry
from kunserve_sglang.control.saved_state import StateFile
from kunserve_sglang.control.upstream import open_session
from kunserve_sglang.core.addresses import LISTEN_BACKLOG, http_url, listen_at
from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.router.app import build_app
from kunserve_sglang.router.http.http_server import HttpServer
from kunserve_sglang.router.http.outbound import InstanceConnections
from kunserve_sglang.router.http.tls import server_context
from kunserve_sglang.router.proxy.tenant_use import TenantsFile
from kunserve_sglang.router.proxy.traffic import Traffic
from kunserve_sglang.router.settings import RouterConfig, launcher_socket

logger = logging.getLogger(__name__)

_KNOWN_WITHIN_S = 5.0
"""How long a router that comes after another lets clients wait for instances that were there."""

_POLL_INTERVAL_S = 0.02


def listen(config: RouterConfig) -> socket.socket:
    """The listening socket; raises `ConfigurationError` if the address cannot be had."""
    if config.listener is not None:
        return socket.socket(fileno=config.listener)
    return listen_at(config.cluster.host, config.cluster.port)


async def serve(config: RouterConfig, listener: socket.socket, stop: asyncio.Event) -> None:
    """Run until `stop` is set; answers under way get a grace, then they are cut.

    Raises `ConfigurationError` if the control address, the certificate or the tenants cannot be
    had.
    """
    tls = server_context(config.cluster)
    cluster = config.cluster
    tenants = TenantsFile(Path(cluster.tenants), config.own_keys) if cluster.tenants else None
    try:
        line = ControlSocket(
            config.control_address,
            tcp=config.cluster.control_listen,
            known_as=config.cluster.control_address,
            keys=config.keys,
        )
    except zmq.ZMQError as error:
        where = config.cluster.control_listen or config.control_address
        raise ConfigurationError(f"cannot bind {where}: {error}") from error
    control = ControlPlane(config.cluster, line, config.model)
    known = tenants.tenants if tenants is not None else None
    traffic = control.front = Traffic(control.registry, config.cluster, known)
    state = StateFile(Path(config.state_file)) if config.state_file else None
    saved = state.read() if state is not None else None
    if saved is not None:
        control.take_over(saved)
    try:
        connections = InstanceConnections()
        control.on_gone = lambda instance: connections.abort(instance.url)
        async with open_session() as session, asyncio.TaskGroup() as tasks:
            follows = saved is not None
            app = build_app(
                config, control, traffic, session, connections, tenants, follows=follows
            )
            http = HttpServer(app)
            watch = HealthWatch(control.registry, session, config.api_key)
            background = [tasks.create_task(control.run()), tasks.create_task(watch.run())]
            await http.listen_for_launcher(launcher_socket(config.control_address))
            if state is not None:
                background.append(tasks.create_task(state.follow(control.saved)))
            if saved is not None:
                await _until_known(control.registry, stop)
                logger.info("took over from a router that has ended")
            await http.start(listener, LISTEN_BACKLOG, tls)
            address, port = listener.getsockname()[:2]
            logger.info("router at %s", http_url(address, port, config.cluster.scheme))
            await stop.wait()
            traffic.queue.close()
            await http.stop(cluster.stop_grace_s)
            await app.close()
            connections.close()
            for task in background:
                task.cancel()
            if state is not None:
                state.keep(control.saved())
    finally:
        control.close()


async def _until_known(registry: Registry, stop: asyncio.Event) -> None:
    """Until all that have served are seen to serve, or not to: some may be gone meanwhile."""
    deadline = registry.now() + _KNOWN_WITHIN_S
    while not stop.is_set() and registry.now() < deadline:
        served = [i.liveness for i in registry.instances.values() if i.liveness.served]
        if not any(liveness.state is LivenessState.STARTING for liveness in served):
            return
        await asyncio.sleep(_POLL_INTERVAL_S)
