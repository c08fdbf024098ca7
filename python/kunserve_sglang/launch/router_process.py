"""The router that one launcher runs: watched, and started again under the same address."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import msgspec

from kunserve_sglang.core.addresses import listen_at
from kunserve_sglang.launch.console import Console
from kunserve_sglang.launch.ending import StopSignals
from kunserve_sglang.launch.restarts import Remedy, Restarts, Sight
from kunserve_sglang.router.settings import CLUSTER_ENVIRONMENT, RouterConfig

_FIRST_DELAY_S = 0.1
"""A router has no model to load."""

_POLL_S = 0.05

STALLED_AFTER_S = 20.0
"""It has no long steps either; but nobody is served by one that was only slow, and is ended."""


class RouterProcess:
    """Its listening socket is ours, so that clients wait while one router follows the other.

    What instances are and do they tell the next router; what they do not know is in a file. It must
    have answered once to be started again: one that cannot start will not do so next time.
    """

    def __init__(self, limit: int, console: Console) -> None:
        """`limit` is how often it is started again without good service between."""
        self._limit = limit
        self._console = console
        self._restarts = Restarts(limit, _FIRST_DELAY_S, STALLED_AFTER_S)
        self._config: RouterConfig | None = None
        self._listener: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._has_answered = False
        self._reported = False

    @property
    def port(self) -> int:
        """Where it listens; 0 before it does."""
        return int(self._listener.getsockname()[1]) if self._listener else 0

    @property
    def failure(self) -> str:
        """Why there is none and will be none; empty if there is."""
        if self._process is None or self._runs:
            return ""
        if self._has_answered and not self._restarts.over:
            return ""
        if self._restarts.count:
            return f"the router has ended again after {self._limit} restarts (--restart-limit)"
        return f"the router ended with status {self._process.returncode}"

    def start(self, config: RouterConfig) -> None:
        """Raises `ConfigurationError` if its address cannot be had."""
        self._listener = listen_at(config.cluster.host, config.cluster.port)
        self._config = msgspec.structs.replace(config, listener=self._listener.fileno())
        self._start()

    def look(self, *, answered: bool | None) -> None:
        """Start it again if it has ended, end it if it stands still.

        `answered` says whether it did when it was asked last; None: it was not asked.
        """
        if self._process is None:
            return
        running = self._runs
        self._has_answered |= answered is True
        if not self._has_answered:
            return
        if not running and not self._reported:
            self._reported = True
            self._console.error(f"the router ended with status {self._process.returncode}")
        sight = Sight(running=running, serving=answered is True, stalled=answered is False)
        match self._restarts.decide(sight, time.monotonic()):
            case Remedy.START:
                self._console.note(
                    f"starting the router again ({self._restarts.count} of {self._limit})"
                )
                self._start()
            case Remedy.ASK_TO_END | Remedy.KILL as remedy:
                if remedy is Remedy.ASK_TO_END:
                    self._console.error("the router stands still: ending it")
                self._process.kill()  # it would not hear of anything else

    def ask_to_end(self) -> None:
        """It lets nobody in any more, and gives answers under way their grace."""
        if self._process is not None:
            self._process.terminate()

    def wait(self, seconds: float, signals: StopSignals) -> None:
        """Until it has ended, or so long, unless `signals` say not to."""
        deadline = time.monotonic() + seconds
        while self._runs and time.monotonic() < deadline and not signals.at_once:
            time.sleep(_POLL_S)

    def end(self) -> None:
        """Now, if it has not ended; an instance that it asks something does not keep it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    @property
    def _runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _start(self) -> None:
        assert self._config is not None
        assert self._listener is not None
        self._reported = False
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kunserve_sglang.router"],
            env={**os.environ, CLUSTER_ENVIRONMENT: self._config.to_environment()},
            pass_fds=(self._listener.fileno(),),
            process_group=0,
        )
