"""The life of instances that join a running router: ask, start, serve, drain, end."""

from __future__ import annotations

import copy
import shutil
import tempfile
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from kunserve_sglang.api.client import RouterClient
from kunserve_sglang.api.errors import CallError, Refused
from kunserve_sglang.api.types import ClusterStatus, JoinBody, Membership, Workers
from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.core.processes import (
    address_towards,
    clean_up_after,
    divide_cpus,
    free_port,
    this_host,
    within_reach,
)
from kunserve_sglang.core.settings import InstanceConfig, shared_settings
from kunserve_sglang.core.sglang_flags import wanted_device
from kunserve_sglang.launch.console import Console, Step
from kunserve_sglang.launch.fleet import Fleet
from kunserve_sglang.launch.lifecycle import GRACE_S, StopSignals, wait_until_ready

_POLL_INTERVAL_S = 0.5
_POLL_S = 0.1


@dataclass(frozen=True, kw_only=True)
class JoinOptions:
    """What the user said. `host` is where the router reaches these instances; empty: found out.

    `host_id` stands for this host if it is not the kernel's boot id.
    """

    num_instances: int
    memory_budget: int
    drain_timeout_s: float
    host: str = ""
    host_id: str = ""


class Joiner:
    """Owns the instances that one `launch_instance` has started on this host."""

    def __init__(self, router: RouterClient, options: JoinOptions, sglang_argv: list[str]) -> None:
        self._router = router
        self._options = options
        self._argv = sglang_argv
        self._host_id = options.host_id or this_host()
        self._signals = StopSignals()
        self._console = Console()
        self._fleet = Fleet("", self._console)

    def run(self) -> int:
        """Serve until a signal, or until all have left; returns the exit status.

        Raises `ConfigurationError` or `CallError` if the router does not take them.
        """
        self._router.call("status")  # nobody there? Better known before the imports.
        folder = tempfile.mkdtemp(prefix="kunserve-")
        clean_up_after(folder)
        self._fleet = Fleet(folder, self._console)
        self._signals.listen()
        try:
            self._start(folder)
            if not self._wait_until_ready():
                return 0 if self._signals.stop else 1
            status = self._watch()
            if self._signals.stop and not self._signals.at_once:
                self._drain()
            return status
        finally:
            self._stop()
            shutil.rmtree(folder, ignore_errors=True)

    # -- start -----------------------------------------------------------------------------------

    def _start(self, folder: str) -> None:
        with self._console.step("importing SGLang"):
            from kunserve_sglang.sglang_seam import server
            from kunserve_sglang.sglang_seam.compatibility import check_transport
            from kunserve_sglang.sglang_seam.identity import identity_of

            server.preload(wanted_device(self._argv))
            server_args = server.parse_server_args(self._argv)
        body = JoinBody(model=identity_of(server_args))
        count, budget = self._options.num_instances, self._options.memory_budget
        gpus = server.gpus_for(server_args, count, budget)
        for cpus, gpu in zip(divide_cpus(count), gpus, strict=True):
            membership = self._router.call("join", body).read(Membership)
            check_transport(membership.transport, server_args.device)
            instance = self._instance(membership, folder, cpus, gpu)
            self._fleet.start(_with_key(server_args, membership.api_key), instance)
            if membership.owners < 2:
                self._console.error(
                    "groups have room for one instance only, so no drop can help; launch the "
                    "cluster with --join-room"
                )

    def _instance(
        self, membership: Membership, folder: str, cpus: tuple[int, ...], gpu: int
    ) -> InstanceConfig:
        """Raises `ConfigurationError` if there is no way from here to the rest of the cluster."""
        socket = membership.control_address.removeprefix("ipc://")
        near = within_reach(membership.host, self._host_id, socket)
        if not near:
            _check_reachable(membership)
        http = self._options.host or ("127.0.0.1" if near else self._address())
        data = (membership.data_host if near else http) if membership.keys else ""
        number = membership.instance
        return InstanceConfig(
            instance=number,
            url=f"http://{_bracketed(http)}:{free_port(http)}",
            control_address=membership.control_address if near else str(membership.control_tcp),
            data_socket=f"{folder}/data-{number}",
            memory_budget=self._options.memory_budget,
            owners=membership.owners,
            cpus=cpus,
            gpu=gpu,
            **shared_settings(membership),
            data_address=f"tcp://{_bracketed(data)}:*" if data else "",
            keys=membership.keys,
            host=self._options.host_id,
            admin_key=membership.instance_admin_key,
        )

    def _address(self) -> str:
        """This host's, as the router sees it."""
        parts = urlsplit(self._router.url)
        try:
            return address_towards(parts.hostname or "", parts.port or 80)
        except OSError as error:
            raise ConfigurationError(f"no way to {self._router.url}: {error}") from None

    def _wait_until_ready(self) -> bool:
        total = len(self._fleet)
        return wait_until_ready(
            f"starting {total} instance{'s' if total > 1 else ''}",
            self._ready,
            self._fleet.failure,
            console=self._console,
            signals=self._signals,
            poll_s=_POLL_INTERVAL_S,
        )

    def _ready(self, step: Step) -> bool:
        """Whether all are serving; then it says so."""
        serving, total = self._serving(), len(self._fleet)
        step.update(f"{len(serving)} of {total} serving")
        if len(serving) < total:
            return False
        for number, url in serving.items():
            self._console.ready(
                f"KunServe instance {number} is ready: {url}  (joined {self._router.url})"
            )
        return True

    def _serving(self) -> dict[int, str]:
        """Number and address of those that the router sends requests to."""
        try:
            status = self._router.call("status").read(ClusterStatus)
        except CallError:
            return {}  # it may be away for a moment
        ours = self._fleet.numbers
        return {i.id: i.url for i in status.instances if i.id in ours and i.serving}

    # -- serve and end ---------------------------------------------------------------------------

    def _watch(self) -> int:
        """The router may come and go meanwhile: instances serve what they have."""
        while not self._signals.stop:
            self._fleet.report()
            if not self._fleet.running:
                return int(self._fleet.crashed)
            time.sleep(_POLL_S)
        return 0

    def _drain(self) -> None:
        """Leave the cluster in good order; a second signal, or a lost router, cuts it short."""
        deadline = time.monotonic() + self._options.drain_timeout_s
        with self._console.step("draining (once more to end at once)") as step:
            while self._fleet.running and not self._signals.at_once:
                left = deadline - time.monotonic()
                if left <= 0:
                    self._console.error("requests are still under way; ending all the same")
                    return
                try:
                    for number in self._not_yet_leaving():
                        query = {"wait": "false", "timeout_s": f"{left:.1f}"}
                        self._router.call("drain", path={"id": str(number)}, query=query)
                except Refused as error:
                    step.update(str(error))  # a transition, perhaps: it will be over one day
                except CallError as error:
                    self._console.error(f"not drained: {error}")
                    return
                self._fleet.wait(_POLL_INTERVAL_S)
                self._fleet.report()

    def _not_yet_leaving(self) -> list[int]:
        workers = self._router.call("workers").read(Workers).workers
        return [w.id for w in workers if w.id in self._fleet.running and not w.draining]

    def _stop(self) -> None:
        with self._console.step("stopping"):
            self._fleet.ask_to_end(GRACE_S, self._signals)
            self._fleet.end()


def _check_reachable(membership: Membership) -> None:
    if membership.control_tcp is None or membership.keys is None:
        raise ConfigurationError(
            "the router listens to instances of its own host only; launch it with --control-address"
        )
    if membership.api_key is None:
        raise ConfigurationError(
            "an instance on another host listens to the network, so it needs a key that requests "
            "have to show; launch the cluster with --api-key"
        )


def _with_key(server_args: Any, api_key: str | None) -> Any:
    """SGLang's arguments with the cluster's key; raises `ConfigurationError` for another one."""
    if server_args.api_key not in (None, api_key):
        raise ConfigurationError("--api-key is not the cluster's; leave it out to take over that")
    server_args = copy.copy(server_args)
    object.__setattr__(server_args, "api_key", api_key)
    return server_args


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host
