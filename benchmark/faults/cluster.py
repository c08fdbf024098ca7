"""One cluster on three hosts, which goes through all faults: what dies in it is started again."""

from __future__ import annotations

import contextlib
import re
import secrets
import signal
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import psutil

from benchmark.experiment import RunError
from benchmark.faults import launch
from benchmark.faults.hosts import Hosts
from benchmark.faults.processes import GateFile, instance_family, router_of, send
from kunserve_sglang.core.faults import FAULT_ENVIRONMENT, FILE_MARK
from kunserve_sglang.core.processes import divide_cpus, family
from kunserve_sglang.testing import tiny_model
from kunserve_sglang.testing.cluster import Cluster

ROUTER, FIRST, SECOND = "r", "a", "b"
HOST_NAMES = (ROUTER, FIRST, SECOND)
INSTANCES = {FIRST: 1, SECOND: 2}
TOTAL = sum(INSTANCES.values())
SGLANG_FLAGS = ("--dtype", "float32", "--chunked-prefill-size", "256")
_INSTANCE_READY = re.compile(r"^KunServe instance \d+ is ready: (\S+)", re.MULTILINE)
_READY_S = 300.0
_LEAVE_S = 120.0
_RESTARTS = "1000"


def built_model(folder: Path) -> Path:
    """In `folder`: steps take milliseconds, and parameters more memory than KV, as drops like."""
    return tiny_model.build(folder / "tiny-33MB", hidden=256, intermediate=1536, layers=6)


class Launched(Cluster):
    """The launcher of one host's instances; its `url` is that of its first."""

    count = 1

    def ready_url(self) -> str:
        found = _INSTANCE_READY.findall(self._log.read_text(errors="replace"))
        return found[0] if len(found) >= self.count else ""


class FaultedCluster:
    """Context manager: a router on one host, an instance on the next, two on the third.

    The router's launcher is `router`, those of the instances `launchers`, by host.
    """

    def __init__(
        self,
        hosts: Hosts,
        model: Path,
        budget: str,
        logs: Path,
        sglang_flags: Sequence[str] = SGLANG_FLAGS,
    ) -> None:
        self.hosts = hosts
        self._model = model
        self._budget = budget
        self._logs = logs
        self._sglang_flags = tuple(sglang_flags)
        self._stack = ExitStack()
        self._starts = 0
        self.key = secrets.token_hex(16)
        self.launchers: dict[str, Launched] = {}
        self.url = ""
        self.abandoned: set[int] = set()
        """Numbers of instances that nobody starts again."""

    def __enter__(self) -> Self:
        """Raises `ClusterError` if something does not become ready."""
        with self._stack as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="faults-")))
            self.gates = GateFile(folder / "armed")
            self._environment = {
                FAULT_ENVIRONMENT: f"{FILE_MARK}{self.gates.path}",
                "KUNSERVE_ADMIN_API_KEY": self.key,
                "KUNSERVE_API_KEY": self.key,
            }
            self.router = Cluster(
                self._router_command,
                self._logs / "faults-router.log",
                environment=self._environment,
            )
            stack.enter_context(self.router)
            self.url = self.router.url
            stack.callback(self._stop_instances)
            for name in INSTANCES:
                self.launchers[name] = self._launched(name)
                self.launchers[name].start()
            for launched in self.launchers.values():
                launched.__enter__()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def host_of(self, url: str) -> str:
        """The host of the instance at `url`; raises `RunError`."""
        for name in INSTANCES:
            if self.hosts.why_not or self.hosts.address(name) == urlsplit(url).hostname:
                with contextlib.suppress(RunError):
                    self.instance(name, url)
                    return name
        raise RunError(f"nobody listens at {url}")

    def instance(self, host: str, url: str) -> list[psutil.Process]:
        """All processes of an instance."""
        return instance_family(self.launchers[host].pid, url)

    def router_process(self) -> psutil.Process:
        return router_of(self.router.pid)

    def all_of(self, host: str) -> list[psutil.Process]:
        """All processes of a host, its launcher first."""
        return family(self.launchers[host].pid)

    def relaunch(self, host: str, numbers: Iterable[int]) -> None:
        """End what is left on a host, and begin to start it anew, as when it is switched on.

        Its instances had these `numbers`, and will get others.
        """
        self.abandoned |= set(numbers)
        send(self.all_of(host), signal.SIGKILL)  # what stands still hears nothing else
        self.renew(host)

    def renew(self, host: str) -> None:
        """Let the instances of a host leave in good order, and start others in their place."""
        self.launchers[host].stop()
        self.launchers[host] = self._launched(host)
        self.launchers[host].start()

    def log_sizes(self) -> dict[Path, int]:
        """How much each launcher has said so far."""
        return {log: log.stat().st_size for log in sorted(self._logs.glob("faults-*.log"))}

    def said_since(self, before: Mapping[Path, int]) -> str:
        """What was said since `log_sizes`, by whomever."""
        said = []
        for log in self.log_sizes():
            with log.open(errors="replace") as file:
                file.seek(before.get(log, 0))
                said.append(file.read())
        return "\n".join(said)

    def _launched(self, host: str) -> Launched:
        self._starts += 1
        log = self._logs / f"faults-host-{host}-{self._starts}.log"
        launched = Launched(
            lambda _: self._instance_command(host),
            log,
            ready_timeout_s=_READY_S,
            stop_timeout_s=_LEAVE_S,
            environment=self._environment,
        )
        launched.count = INSTANCES[host]
        return launched

    def _stop_instances(self) -> None:
        for launched in self.launchers.values():
            launched.stop()

    def _router_command(self, port: int) -> list[str]:
        address = self.hosts.address(ROUTER)
        command = [
            *(sys.executable, "-m", "benchmark.faults.launch", "router", "--num-instances", "0"),
            *("--host", address, "--port", str(port), "--control-address", f"tcp://{address}:*"),
            *("--max-group-size", str(TOTAL), "--overload-policy", "none", "--checksums"),
            *("--restart-limit", _RESTARTS),
        ]
        return self.hosts.command(ROUTER, command)

    def _instance_command(self, host: str) -> list[str]:
        count = INSTANCES[host]
        # A host has as many cores as instances, as far as there are any.
        cpus = [cpu for part in divide_cpus(TOTAL)[-count:] for cpu in part]
        command = [
            *("taskset", "-c", ",".join(map(str, sorted(set(cpus))))),
            *(sys.executable, "-m", "benchmark.faults.launch", "instances", "--router", self.url),
            *("--host", self.hosts.address(host), "--host-id", f"faults-{host}"),
            *("--num-instances", str(count), "--memory-budget", self._budget),
            *("--model-path", str(self._model), "--restart-limit", _RESTARTS, "--migrate"),
            *self._sglang_flags,
            *launch.FLAGS,
        ]
        return self.hosts.command(host, command)


def deaths(status: dict[str, Any]) -> list[int]:
    """Instances that the router takes for lost."""
    return [i["id"] for i in status["instances"] if i.get("lost") or i["mode"] == "dead"]
