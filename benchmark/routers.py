"""The two routers that are compared, as processes of their own on cores of their own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from benchmark.noise import cpu_s
from benchmark.program import ROOT
from kunserve_sglang.core.processes import free_port
from kunserve_sglang.testing.cluster import Cluster, ClusterError, router_command

UPSTREAM = "sglang-router==0.3.2"
_ENVIRONMENTS = ROOT / "build"
_INSTALL_TIMEOUT_S = 600.0
_SERVING_TIMEOUT_S = 30.0


class Router(Cluster):
    """A router before `workers`; the process and all it starts run on `cpus`.

    It is the one of `checkout`, which may be another version than this.
    """

    def __init__(
        self, log: Path, cpus: Sequence[int], workers: Sequence[str], checkout: Path = ROOT
    ) -> None:
        environment = {"PYTHONPATH": str(checkout / "python")}
        super().__init__(self.command, log, ready_timeout_s=60, environment=environment)
        self._cpus = cpus
        self._workers = workers

    def command(self, port: int) -> list[str]:
        # Upstream's has its cheapest policy, too: nobody reads prompts here.
        return [*router_command(port), "--dispatch", "least_load"]

    def __enter__(self) -> Self:
        """Raises `ClusterError` unless all workers are found healthy."""
        super().__enter__()
        deadline = time.monotonic() + _SERVING_TIMEOUT_S
        try:
            self.add_workers()
            while self.healthy() < len(self._workers):
                self.check_running()
                if time.monotonic() > deadline:
                    raise ClusterError(f"{type(self).__name__} did not find its workers healthy")
                time.sleep(0.1)
        except BaseException:
            self.stop()
            raise
        return self

    def start(self) -> None:
        with _on_cores(self._cpus):
            super().start()

    @property
    def port(self) -> int:
        return self._port

    def add_workers(self) -> None:
        for url in self._workers:
            _call("POST", f"{self.url}/workers", {"url": url})

    def healthy(self) -> int:
        return int(_call("GET", f"{self.url}/workers")["stats"]["healthy"])

    def cpu_s(self) -> float:
        """CPU seconds that the process and its descendants have used so far."""
        return cpu_s(self.pid)


class UpstreamRouter(Router):
    """SGLang's own router, with its cheapest policy, no log of requests and no limit on them."""

    def command(self, port: int) -> list[str]:
        return [
            *(str(upstream_python()), "-m", "sglang_router.launch_router"),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--worker-urls", *self._workers),
            *("--policy", "round_robin", "--max-concurrent-requests", "-1"),
            *("--log-level", "error", "--prometheus-port", str(free_port())),
        ]

    def ready_url(self) -> str:
        url = f"http://127.0.0.1:{self._port}"
        try:
            _call("GET", f"{url}/readiness")
        except OSError:
            return ""  # not up yet; we are asked again
        return url

    def add_workers(self) -> None:
        """It was started with them."""

    def healthy(self) -> int:
        return int(_call("GET", f"{self.url}/readiness")["healthy_workers"])


def install_upstream() -> None:
    """Make its environment in `build/`, unless it is there. Raises `ClusterError`."""
    if upstream_python().exists():
        return
    folder = upstream_python().parent.parent
    making = folder.with_name(f"{folder.name}.new")
    pip = (str(making / "bin" / "python"), "-m", "pip", "-q", "install", UPSTREAM)
    try:
        for command in ((sys.executable, "-m", "venv", "--clear", str(making)), pip):
            subprocess.run(command, check=True, timeout=_INSTALL_TIMEOUT_S)
    except subprocess.SubprocessError as error:
        raise ClusterError(f"could not install {UPSTREAM}: {error}") from error
    making.rename(folder)


def upstream_python() -> Path:
    """Of the environment that `install_upstream` makes."""
    return _ENVIRONMENTS / UPSTREAM.replace("==", "-") / "bin" / "python"


@contextlib.contextmanager
def _on_cores(cpus: Sequence[int]) -> Iterator[None]:
    """What is started inside the block begins, and stays, on these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _call(method: str, url: str, body: object = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, data, headers, method=method)
    with urllib.request.urlopen(request, timeout=10) as response:
        return json.load(response)
