"""A cluster as a subprocess: started, waited for, and ended with everything that belongs to it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

import psutil

from kunserve_sglang.core.processes import die_with_parent, family, free_port

READY_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 30.0
_READY = re.compile(r"^KunServe is ready: (http://\S+)", re.MULTILINE)
_POLL_S = 0.1
_TAIL_LINES = 30


class ClusterError(Exception):
    """The cluster ended, or never became ready; the message ends with the tail of its log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterOptions:
    """What to start; `sglang_flags` go to SGLang as they are, `kunserve_flags` are ours."""

    model_path: Path
    memory_budget: str
    overload_policy: str
    num_instances: int = 2
    sglang_flags: tuple[str, ...] = ()
    kunserve_flags: tuple[str, ...] = ()

    def command(self, port: int) -> list[str]:
        return [
            *(sys.executable, "-m", "kunserve_sglang.launch_server"),
            *("--model-path", str(self.model_path)),
            *("--num-instances", str(self.num_instances)),
            *("--memory-budget", self.memory_budget),
            *("--overload-policy", self.overload_policy),
            *("--port", str(port)),
            *self.kunserve_flags,
            *self.sglang_flags,
        ]


def router_command(port: int) -> list[str]:
    """A router without instances of its own, for plain SGLang servers."""
    launcher = (sys.executable, "-m", "kunserve_sglang.launch_server")
    return [*launcher, "--num-instances", "0", "--port", str(port)]


class Cluster:
    """Context manager: the cluster serves at `url` between entry and exit.

    All output goes to `log`. The launcher gets SIGTERM if this process ends, however it ends. To
    start several at once, `start` all of them before the first one is entered.
    """

    def __init__(
        self,
        command: Callable[[int], Sequence[str]],
        log: Path,
        *,
        ready_timeout_s: float = READY_TIMEOUT_S,
        stop_timeout_s: float = STOP_TIMEOUT_S,
        on_wait: Callable[[float], None] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`command` makes the launcher's command line for a port; `on_wait` gets seconds.

        `environment` comes on top of this process's.
        """
        self._command = command
        self._environment = {**os.environ, **(environment or {})}
        self._port = 0
        self._log = log
        self._ready_timeout_s = ready_timeout_s
        self._stop_timeout_s = stop_timeout_s
        self._on_wait = on_wait
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""
        self.startup_s = 0.0

    def __enter__(self) -> Self:
        """Raises `ClusterError` if the cluster ends or takes too long before it is ready."""
        if self._process is None:
            self.start()
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Begin; whoever calls this must enter the context, or call `stop`."""
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._port = free_port()
        with self._log.open("wb") as log:
            # A session of its own: Ctrl-C reaches us, and we stop the cluster in good order.
            self._process = subprocess.Popen(
                list(self._command(self._port)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=partial(die_with_parent, signal.SIGTERM),
                env=self._environment,
            )

    def ready_url(self) -> str:
        """Where it serves; empty as long as it does not."""
        found = _READY.search(self._log.read_text(errors="replace"))
        return found[1] if found else ""

    @property
    def pid(self) -> int:
        """The launcher's process id; raises `ClusterError` outside the context."""
        if self._process is None:
            raise ClusterError("the cluster is not running")
        return self._process.pid

    def check_running(self) -> None:
        """Raises `ClusterError` if the launcher has ended by itself."""
        if self._process is not None and self._process.poll() is not None:
            raise ClusterError(
                f"the cluster ended with status {self._process.returncode}\n{log_tail(self._log)}"
            )

    def stop(self) -> None:
        """End the launcher and all its descendants: ask, wait a little, then insist."""
        if self._process is None:
            return
        started = family(self._process.pid)[1:]
        self._process.terminate()
        deadline = time.monotonic() + self._stop_timeout_s
        try:
            self._process.wait(self._stop_timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        _, alive = psutil.wait_procs(started, timeout=max(1.0, deadline - time.monotonic()))
        for process in alive:
            process.kill()
        psutil.wait_procs(alive, timeout=5)
        self._process = None

    def _wait_until_ready(self) -> None:
        started = time.monotonic()
        while (waited := time.monotonic() - started) < self._ready_timeout_s:
            if url := self.ready_url():
                self.url = url
                self.startup_s = waited
                return
            self.check_running()
            if self._on_wait is not None:
                self._on_wait(waited)
            time.sleep(_POLL_S)
        raise ClusterError(
            f"the cluster was not ready within {self._ready_timeout_s:.0f} s\n{log_tail(self._log)}"
        )


def log_tail(log: Path, lines: int = _TAIL_LINES) -> str:
    """The last lines of a log, under its name."""
    with log.open(errors="replace") as file:
        tail = deque(file, maxlen=lines)
    return f"--- end of {log} ---\n{''.join(tail)}"
