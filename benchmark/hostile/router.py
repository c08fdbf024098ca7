"""The router as a process of its own, between strangers and two instances that are mocks."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Self

import psutil

from kunserve_sglang.api.client import RouterClient
from kunserve_sglang.api.errors import CallError
from kunserve_sglang.api.types import ClusterStatus, WorkerBody
from kunserve_sglang.core.choices import OverloadPolicy
from kunserve_sglang.core.cluster_config import ClusterConfig
from kunserve_sglang.core.processes import free_port
from kunserve_sglang.router.settings import CLUSTER_ENVIRONMENT, RouterConfig
from kunserve_sglang.testing.cluster import ClusterError, log_tail

ADMIN_KEY = "the-admin-key-of-this-benchmark"
_READY_TIMEOUT_S = 30.0
_ANSWER_TIMEOUT_S = 10.0


class RouterProcess:
    """Context manager: the product's router, with a key for its admin API and an open front."""

    def __init__(self, folder: Path, instances: int) -> None:
        self._folder = folder
        self.log = folder / "router.log"
        self.port = free_port()
        self.control_address = f"ipc://{folder}/control"
        self._config = RouterConfig(
            cluster=ClusterConfig(
                num_instances=instances,
                port=self.port,
                overload_policy=OverloadPolicy.NONE,
                admin_api_key=ADMIN_KEY,
            ),
            control_address=self.control_address,
        )

    def __enter__(self) -> Self:
        """Raises `ClusterError` if it does not come up."""
        environment = {**os.environ, CLUSTER_ENVIRONMENT: self._config.to_environment()}
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "kunserve_sglang.router"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            self._wait()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def rss_bytes(self) -> int:
        return int(psutil.Process(self._process.pid).memory_info().rss)

    def tracebacks(self) -> int:
        """Exceptions that nothing had an answer for, as the log has them."""
        return self.log.read_bytes().count(b"Traceback (most recent call last)")

    def healthy(self, instances: int) -> bool:
        """Whether it answers, and says that so many instances serve."""
        client = RouterClient(f"127.0.0.1:{self.port}", ADMIN_KEY)
        try:
            status = client.call("status", timeout_s=_ANSWER_TIMEOUT_S).read(ClusterStatus)
        except CallError:
            return False
        return sum(i.serving for i in status.instances) >= instances

    def serve_through(self, worker: str) -> None:
        """Add a plain server, and wait until requests go there. Raises `ClusterError`."""
        client = RouterClient(f"127.0.0.1:{self.port}", ADMIN_KEY)
        client.call("add_worker", WorkerBody(url=worker))
        self._wait(1)

    def _wait(self, instances: int = 0) -> None:
        deadline = time.monotonic() + _READY_TIMEOUT_S
        while not self.healthy(instances):
            if not self.running or time.monotonic() > deadline:
                raise ClusterError(f"the router did not serve\n{log_tail(self.log)}")
            time.sleep(0.1)

    def _stop(self) -> None:
        if self.running:
            self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def runtime_folder() -> tempfile.TemporaryDirectory[str]:
    """Short, since the path of a socket has little room."""
    return tempfile.TemporaryDirectory(prefix="ks-")
