"""Upstream SGLang as a cluster: plain servers of the pinned wheel, and our router before them.

The wheel has nothing but the import guards that a CPU needs. Each server gets what an instance of
KunServe has: its number of token slots, and the same cores for its scheduler, a thread each.
"""

from __future__ import annotations

import http.client
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import psutil

from kunserve_sglang.core.processes import divide_cpus, family
from kunserve_sglang.testing.cluster import (
    READY_TIMEOUT_S,
    STOP_TIMEOUT_S,
    Cluster,
    ClusterError,
    router_command,
)

_BUILDER = Path(__file__).resolve().parents[3] / "scripts" / "build_sglang.py"
_BUILD_TIMEOUT_S = 600.0
_SERVING_TIMEOUT_S = 30.0
_FLAGS = ("--log-level", "warning")
_ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Platform:
    """What a plain server needs on a device, beside the flags that it shares with KunServe."""

    flags: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    guards: bool = False


CPU = Platform(
    flags=(
        *("--device", "cpu"),
        *("--attention-backend", "torch_native"),
        *("--sampling-backend", "pytorch"),
        # Else a server with nothing to do takes all of its core from the processes around it.
        "--sleep-on-idle",
    ),
    environment={"SGLANG_USE_CPU_ENGINE": "1"},
    guards=True,
)
GPU = Platform()


class PlainServer(Cluster):
    """One SGLang server without KunServe; its scheduler runs on `cpus`, a thread a core."""

    def __init__(
        self,
        folder: Path,
        flags: Sequence[str],
        environment: Mapping[str, str],
        cpus: tuple[int, ...],
        log: Path,
        *,
        ready_timeout_s: float,
        stop_timeout_s: float,
        on_wait: Callable[[float], None] | None = None,
        host: str = "127.0.0.1",
        through: Sequence[str] = (),
    ) -> None:
        """`folder` gets the server's temporary files.

        It listens at `host`, and is started by the command `through`, if there is one.
        """
        self._cpus = cpus
        self._host = host
        launcher = (*through, sys.executable, "-m", "sglang.launch_server", "--host", host)
        super().__init__(
            lambda port: [*launcher, *flags, *_FLAGS, "--port", str(port)],
            log,
            ready_timeout_s=ready_timeout_s,
            stop_timeout_s=stop_timeout_s,
            on_wait=on_wait,
            environment={
                **_ENVIRONMENT,
                **environment,
                "OMP_NUM_THREADS": str(len(cpus)),
                "TMPDIR": str(folder),
            },
        )

    def __enter__(self) -> Self:
        super().__enter__()
        self._pin_scheduler()
        return self

    def ready_url(self) -> str:
        return healthy_url(self._host, self._port)

    def stop(self) -> None:
        """As a cluster, and without the shared memory that SGLang leaves behind."""
        shared = self._shared_files()
        super().stop()
        for file in shared:
            file.unlink(missing_ok=True)

    def _pin_scheduler(self) -> None:
        schedulers = [p for p in family(self.pid) if "sglang::scheduler" in " ".join(p.cmdline())]
        if len(schedulers) != 1:
            raise ClusterError(f"a server has {len(schedulers)} schedulers, expected one")
        for thread in schedulers[0].threads():
            os.sched_setaffinity(thread.id, self._cpus)

    def _shared_files(self) -> set[Path]:
        """What our processes, and no others, have mapped from `/dev/shm`."""
        found: set[Path] = set()
        try:
            for process in family(self.pid):
                found |= {Path(m.path) for m in process.memory_maps()}
        except (ClusterError, psutil.NoSuchProcess):
            return set()  # it has ended already
        return {path for path in found if path.parent == Path("/dev/shm")}


class UpstreamCluster:
    """Context manager: as many plain servers as there would be instances, behind one router."""

    def __init__(
        self,
        model_path: Path,
        slots: int,
        sglang_flags: Sequence[str],
        logs: Path,
        *,
        num_instances: int = 2,
        platform: Platform = CPU,
        ready_timeout_s: float = READY_TIMEOUT_S,
        stop_timeout_s: float = STOP_TIMEOUT_S,
        on_wait: Callable[[float], None] | None = None,
    ) -> None:
        """`slots` is the number of KV token slots of each server."""
        self._flags = [
            *("--model-path", str(model_path)),
            *("--max-total-tokens", str(slots)),
            *sglang_flags,
            *platform.flags,
        ]
        self._platform = platform
        self._ready_timeout_s = ready_timeout_s
        self._stop_timeout_s = stop_timeout_s
        self._logs = logs
        self._count = num_instances
        self._on_wait = on_wait
        self._stack = ExitStack()
        self._members: list[Cluster] = []
        self.url = ""
        self.server_urls: list[str] = []
        """The servers themselves, past the router."""

    def __enter__(self) -> Self:
        """Raises `ClusterError` if one of them does not become ready."""
        with self._stack as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="upstream-")))
            environment = {**self._platform.environment, **self._path(folder)}
            servers = [
                PlainServer(
                    folder,
                    self._flags,
                    environment,
                    cpus,
                    self._logs / f"upstream-{i}.log",
                    ready_timeout_s=self._ready_timeout_s,
                    stop_timeout_s=self._stop_timeout_s,
                    on_wait=self._on_wait,
                )
                for i, cpus in enumerate(divide_cpus(self._count))
            ]
            for server in servers:
                stack.callback(server.stop)
                server.start()
            for server in servers:
                stack.enter_context(server)
            router = Cluster(router_command, self._logs / "upstream-router.log")
            self._members = [*servers, stack.enter_context(router)]
            self.url = router.url
            self.server_urls = [server.url for server in servers]
            put_behind(router, servers)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def check_running(self) -> None:
        """Raises `ClusterError` if one of the processes has ended by itself."""
        for member in self._members:
            member.check_running()

    def _path(self, folder: Path) -> dict[str, str]:
        """Where servers find upstream's SGLang: unpacked in `folder`, unless it is installed."""
        if not self._platform.guards and upstream_installed():
            return {}
        unpack_upstream(folder)
        inherited = os.environ.get("PYTHONPATH")
        return {"PYTHONPATH": os.pathsep.join(filter(None, (str(folder), inherited)))}


def healthy_url(host: str, port: int) -> str:
    """The address, once `/health` answers with 200: the first request has been through."""
    connection = http.client.HTTPConnection(host, port, timeout=30)
    try:
        connection.request("GET", "/health")
        healthy = connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        healthy = False  # not up yet; we are asked again
    finally:
        connection.close()
    return f"http://{host}:{port}" if healthy else ""


def put_behind(router: Cluster, servers: Sequence[Cluster]) -> None:
    """Let a router without instances have these, and find them healthy. Raises `ClusterError`."""
    for server in servers:
        _call("POST", f"{router.url}/workers", {"url": server.url})
    deadline = time.monotonic() + _SERVING_TIMEOUT_S
    while time.monotonic() < deadline:
        if _call("GET", f"{router.url}/workers")["stats"]["healthy"] == len(servers):
            return
        for member in (router, *servers):
            member.check_running()
        time.sleep(0.1)
    raise ClusterError("the router did not find the plain servers healthy")


def upstream_installed() -> bool:
    """Whether the SGLang that is imported here is upstream's own, and not the fork."""
    return "+" not in importlib.metadata.version("sglang")


def unpack_upstream(folder: Path) -> None:
    """The pinned wheel with the import guards only, to be put first on the path of a Python.

    Raises `ClusterError` if it cannot be built.
    """
    built = subprocess.run(
        [sys.executable, str(_BUILDER), "--guards-only"],
        stdout=subprocess.PIPE,
        text=True,
        timeout=_BUILD_TIMEOUT_S,
        check=False,
    )
    if built.returncode != 0:
        raise ClusterError(f"{_BUILDER.name} could not build upstream's wheel")
    with zipfile.ZipFile(built.stdout.split()[-1]) as wheel:
        wheel.extractall(folder)


def _call(method: str, url: str, body: object = None) -> dict[str, dict[str, int]]:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, data, headers, method=method)
    with urllib.request.urlopen(request, timeout=10) as response:
        answer: dict[str, dict[str, int]] = json.load(response)
    return answer
