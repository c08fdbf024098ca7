"""One router: control plane, health watch and HTTP server in one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator

import aiohttp
import uvicorn
import zmq

from kunserve_sglang.config import ClusterConfig
from kunserve_sglang.errors import ConfigurationError
from kunserve_sglang.router.app import build_app
from kunserve_sglang.router.control_plane import ControlPlane
from kunserve_sglang.router.health import HealthWatch
from kunserve_sglang.router.settings import RouterConfig
from kunserve_sglang.router.upstream import open_session

logger = logging.getLogger(__name__)

_GRACE_S = 2
"""How long answers may go on after a stop was asked for; the router ends within a second more."""

_KEEP_ALIVE_S = 75
"""Above what HTTP clients keep idle connections for, so that it is they who close them."""

_BACKLOG = 4096


class _HttpServer(uvicorn.Server):
    """Signals are handled by the process, which has more to stop than this server."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


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
    try:
        async with open_session() as session:
            http = _http_server(config, control, session)
            watch = HealthWatch(control.registry, session, config.api_key)
            async with asyncio.TaskGroup() as tasks:
                background = [
                    tasks.create_task(control.run()),
                    tasks.create_task(watch.run()),
                ]
                serving = tasks.create_task(http.serve(sockets=[listener]))
                logger.info("router at http://%s:%d", *listener.getsockname()[:2])
                await stop.wait()
                control.queue.close()
                http.should_exit = True
                await serving
                for task in background:
                    task.cancel()
    finally:
        control.close()


def _http_server(
    config: RouterConfig, control: ControlPlane, session: aiohttp.ClientSession
) -> _HttpServer:
    # The proxy reports every answer that it breaks off, with the reason; uvicorn has none to add.
    logging.getLogger("uvicorn.error").addFilter(_not_about_cut_answers)
    return _HttpServer(
        uvicorn.Config(
            build_app(config, control, session),
            log_config=None,
            log_level="warning",
            access_log=False,
            # Passes request targets on as they came, so that the proxy can refuse odd ones.
            http="h11",
            lifespan="off",
            ws="none",
            proxy_headers=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=_GRACE_S,
        )
    )


def _not_about_cut_answers(record: logging.LogRecord) -> bool:
    return record.msg != "ASGI callable returned without completing response."
