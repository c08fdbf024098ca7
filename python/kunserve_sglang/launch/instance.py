"""Instances that join a running router: they ask for their place, and drain before they end."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from kunserve_sglang.api.client import RouterClient
from kunserve_sglang.api.errors import CallError, Refused, Unreachable
from kunserve_sglang.api.service import ServiceStatus
from kunserve_sglang.api.types import InstanceStatus, JoinBody, Membership, Workers
from kunserve_sglang.core.addresses import address_towards, bracketed, http_url
from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.core.instance_config import InstanceConfig
from kunserve_sglang.core.processes import free_port, this_host, within_reach
from kunserve_sglang.core.sglang_flags import wanted_device
from kunserve_sglang.launch.life import Life
from kunserve_sglang.launch.options import JoinOptions

_POLL_INTERVAL_S = 0.5
_FORGET_S = 5.0
"""How long the router may take to notice that an instance has ended."""


class Joiner(Life):
    """Owns the instances that one `launch_instance` has started on this host.

    The router may come and go meanwhile: instances serve what they have.
    """

    goes_on_alone = False

    def __init__(self, router: RouterClient, options: JoinOptions, sglang_argv: list[str]) -> None:
        super().__init__(options)
        self._router = router
        self._options = options
        self._argv = sglang_argv
        self._host_id = options.host_id or this_host()

    def _check(self) -> None:
        if not self._options.router_wait_s:
            self._router.call("status")  # nobody there? Better known before the imports.

    def _start(self) -> None:
        if self._options.router_wait_s and not self._wait_for_router():
            return
        with self._console.step("importing SGLang"):
            from kunserve_sglang.sglang_seam import server
            from kunserve_sglang.sglang_seam.compatibility import check_transport
            from kunserve_sglang.sglang_seam.identity import identity_of

            server.preload(wanted_device(self._argv))
            server_args = server.parse_server_args(
                self._argv, self._options.memory_budget, self._console.note
            )
        body = JoinBody(model=identity_of(server_args))
        count, budget = self._options.num_instances, self._options.memory_budget
        gpus = server.gpus_for(server_args, count, budget)
        cores = self._cores(count, server_args.device)
        for cpus, gpu in zip(cores, gpus, strict=True):
            membership = self._router.call("join", body).read(Membership)
            check_transport(membership.transport, server_args.device)
            instance = self._instance(membership, cpus, gpu)
            self._fleet.start(_with_key(server_args, membership.api_key), instance)
            if membership.owners < 2:
                self._console.error(
                    "groups have room for one instance only, so no drop can help; launch the "
                    "cluster with --join-room"
                )

    def _wait_for_router(self) -> bool:
        """False after a signal. Raises `Unreachable` if nobody has answered in time."""
        deadline = time.monotonic() + self._options.router_wait_s
        with self._console.step(f"waiting for {self._router.url}"):
            while not self._signals.stop:
                try:
                    self._router.call("status")
                    return True
                except Unreachable:
                    if time.monotonic() > deadline:
                        raise
                time.sleep(_POLL_INTERVAL_S)
        return False

    def _instance(self, membership: Membership, cpus: tuple[int, ...], gpu: int) -> InstanceConfig:
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
            url=http_url(http, free_port(http)),
            control_address=membership.control_address if near else str(membership.control_tcp),
            data_socket=f"{self._folder}/data-{number}",
            memory_budget=self._options.memory_budget,
            owners=membership.owners,
            cpus=cpus,
            gpu=gpu,
            data_address=f"tcp://{bracketed(data)}:*" if data else "",
            keys=membership.keys,
            host=self._options.host_id,
            admin_key=membership.instance_admin_key,
        ).sharing(membership)

    def _address(self) -> str:
        """This host's, as the router sees it."""
        parts = urlsplit(self._router.url)
        try:
            return address_towards(parts.hostname or "", parts.port or 80)
        except OSError as error:
            raise ConfigurationError(f"no way to {self._router.url}: {error}") from None

    def _look_at_router(self, *, answered: bool | None) -> None:
        """It is another launcher's."""

    def _announce(
        self,
        instances: Sequence[InstanceStatus],
        service: ServiceStatus | None,  # noqa: ARG002 (the router says it)
    ) -> None:
        for instance in instances:
            self._console.ready(
                f"KunServe instance {instance.id} is ready: {instance.url}  "
                f"(joined {self._router.url})"
            )

    def _leave(self) -> None:
        """Drain all, in good order; a second signal, or a lost router, cuts it short."""
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
                        query |= {"migrate": "true"} if self._options.migrate else {}
                        self._router.call("drain", path={"id": str(number)}, query=query)
                except Refused as error:
                    step.update(str(error))  # a transition, perhaps: it will be over one day
                except CallError as error:
                    self._console.error(f"not drained: {error}")
                    return
                self._fleet.wait(_POLL_INTERVAL_S)
                self._fleet.report()

    def _stop(self) -> None:
        super()._stop()
        if not self._signals.at_once:
            self._let_forget()

    def _let_forget(self) -> None:
        """What has ended without leaving will not be started again, so nobody has to expect it."""
        deadline = time.monotonic() + _FORGET_S
        while (dead := self._known() - self._fleet.left) and time.monotonic() < deadline:
            for number in dead:
                try:
                    self._router.call("drain", path={"id": str(number)})
                except CallError:  # not noticed yet that it is gone, perhaps: once more
                    time.sleep(_POLL_INTERVAL_S)

    def _known(self) -> set[int]:
        """Our instances that the router knows; none if it does not answer."""
        try:
            workers = self._router.call("workers").read(Workers).workers
        except CallError:
            return set()
        return {worker.id for worker in workers} & set(self._fleet.numbers)

    def _not_yet_leaving(self) -> list[int]:
        workers = self._router.call("workers").read(Workers).workers
        return [w.id for w in workers if w.id in self._fleet.running and not w.draining]


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
