"""`python -m kunserve_sglang.router`: the router process; started by the launcher."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import signal
import socket
import sys

import setproctitle

from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.core.faults import arm_from_environment
from kunserve_sglang.core.processes import die_with_parent
from kunserve_sglang.router.admin.audit import logger as audit
from kunserve_sglang.router.server import listen, serve
from kunserve_sglang.router.settings import RouterConfig, router_from_environment

logger = logging.getLogger(__name__)


def main() -> int:
    """Runs the router; returns the exit status of the process."""
    setproctitle.setproctitle("kunserve::router")
    logging.basicConfig(
        level=logging.INFO,
        format="[%(asctime)s router] %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
    )
    _open_audit_log()
    try:
        config = router_from_environment()
        arm_from_environment()
        listener = listen(config)
        _raise_file_limit()
        # What was imported stays for good: full collections need not walk it while streams wait.
        gc.collect()
        gc.freeze()
        with asyncio.Runner(loop_factory=_new_event_loop) as runner:
            runner.run(_run(config, listener))
    except ConfigurationError as error:
        logger.error("%s", error)
        return 2
    return 0


def _open_audit_log() -> None:
    """Beside the other lines and without their prefix: whoever reads JSON takes those with `{`."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    audit.addHandler(handler)
    audit.setLevel(logging.INFO)
    audit.propagate = False


def _new_event_loop() -> asyncio.AbstractEventLoop:
    """uvloop's where it is installed: it spends less time on a chunk."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


async def _run(config: RouterConfig, listener: socket.socket) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if config.launcher:
        die_with_parent(signal.SIGTERM)
        if _is_orphan(config):
            stop.set()  # it was gone before the kernel knew that we care
    await serve(config, listener, stop)


def _is_orphan(config: RouterConfig) -> bool:
    """Whether a launcher has started this router and has ended since."""
    return config.launcher != 0 and os.getppid() != config.launcher


def _raise_file_limit() -> None:
    """Every stream takes two sockets, and 1,024 is a common default."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    sys.exit(main())
