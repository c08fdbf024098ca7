"""The router as a process of its own, with instances that outlive it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import psutil

from kunserve_sglang.core.choices import OverloadPolicy
from kunserve_sglang.core.cluster_config import ClusterConfig
from kunserve_sglang.core.faults import FAULT_ENVIRONMENT
from kunserve_sglang.core.processes import free_port
from kunserve_sglang.router.settings import CLUSTER_ENVIRONMENT, RouterConfig
from tests.support.background import Background
from tests.support.mock_instance import MockInstance
from tests.support.router_harness import Client
from tests.support.waiting import until

_START_S = 30.0


class RouterInProcess:
    """`urls` are those of servers in place of the instances' workers; without any there is one."""

    def __init__(
        self, folder: Path, background: Background, urls: Sequence[str] = ("",), key: str = "key"
    ) -> None:
        """`key` is what instances know the router by."""
        cluster = ClusterConfig(
            num_instances=len(urls), port=free_port(), overload_policy=OverloadPolicy.NONE
        )
        self._config = RouterConfig(
            cluster=cluster,
            control_address=f"ipc://{folder}/c",
            state_file=f"{folder}/router.json",
            instance_admin_key=key,
        )
        self.client = Client(cluster.port)
        self.instances = [
            MockInstance(number, self._config.control_address, background, url=url)
            for number, url in enumerate(urls)
        ]
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def instance(self) -> MockInstance:
        """The first of them."""
        return self.instances[0]

    def start(self, fault: str = "", **changes: object) -> psutil.Process:
        """Returns when it has found the instances; `changes` are of its settings."""
        config = msgspec.structs.replace(self._config, **changes)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kunserve_sglang.router"],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
                CLUSTER_ENVIRONMENT: config.to_environment(),
                FAULT_ENVIRONMENT: fault,
            },
            stderr=subprocess.PIPE,
        )
        until(self._ready, _START_S)
        return psutil.Process(self.process.pid)

    def end(self, number: signal.Signals = signal.SIGKILL) -> bytes:
        """Returns what it has said."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.communicate(timeout=20)[1]

    def close(self) -> None:
        if self.process is not None:
            self.end()
        for instance in self.instances:
            instance.stop()

    def _ready(self) -> bool:
        try:
            return self.client.get("/readiness").status == 200
        except ConnectionError:
            return False
