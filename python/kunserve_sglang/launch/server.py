"""A router and its instances on this host, started and ended together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import UNSET

from kunserve_sglang.api.client import RouterClient
from kunserve_sglang.api.service import ServiceStatus
from kunserve_sglang.api.types import InstanceStatus
from kunserve_sglang.core.addresses import http_url, listen_at
from kunserve_sglang.core.choices import DispatchPolicy
from kunserve_sglang.core.cluster_config import ClusterConfig
from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.core.identity import ModelIdentity
from kunserve_sglang.core.instance_config import InstanceConfig
from kunserve_sglang.core.keys import ClusterKeys
from kunserve_sglang.core.processes import free_port
from kunserve_sglang.core.prompt_format import PromptFormat
from kunserve_sglang.core.sglang_flags import wanted_device
from kunserve_sglang.core.tenants import read_tenants
from kunserve_sglang.launch.ending import GRACE_S
from kunserve_sglang.launch.life import Life
from kunserve_sglang.launch.options import LaunchOptions, with_api_key
from kunserve_sglang.launch.router_process import RouterProcess
from kunserve_sglang.launch.standing import new_standing, standing_in, with_control_port
from kunserve_sglang.router.settings import RouterConfig, launcher_socket


class Supervisor(Life):
    """Owns all processes of a cluster on this host."""

    goes_on_alone = True  # others may still come

    def __init__(
        self, config: ClusterConfig, options: LaunchOptions, sglang_argv: list[str]
    ) -> None:
        super().__init__(options)
        self._config = config
        self._options = options
        self._argv = sglang_argv
        self._router_process = RouterProcess(options.restart_limit, self._console)
        self._standing = new_standing()

    def _check(self) -> None:
        if not self._config.num_instances:
            self._router_config(self._options.api_key)  # raises what makes no sense
            if self._argv:
                raise ConfigurationError(
                    f"{self._argv[0]}: with --num-instances 0 there is no instance for it"
                )
        if self._config.tenants:
            given = self._config
            keys = (self._options.api_key, given.admin_api_key, given.read_api_key)
            read_tenants(Path(self._config.tenants), keys)  # raises what is wrong with it
        listen_at(self._config.host, self._config.port).close()
        wanted = self._config.control_listen
        if self._config.state_folder:
            self._standing = standing_in(Path(self._config.state_folder), wanted)
        else:
            self._standing = with_control_port(self._standing, wanted)
        if (named := self._config.control_address) is not None:
            found = self._standing.control_address(named)
            self._config = msgspec.structs.replace(self._config, control_address=found)

    @property
    def _state_folder(self) -> str:
        """Of what others go by; it is as old as the launcher if nothing else is wanted."""
        return self._config.state_folder or self._folder

    @property
    def _control_address(self) -> str:
        return f"ipc://{self._state_folder}/control"

    @property
    def _keys(self) -> ClusterKeys | None:
        return self._standing.keys if self._config.data_host else None

    def _start(self) -> None:
        if not self._config.num_instances:
            self._start_router(self._router_config(self._options.api_key))
            return
        with self._console.step("importing SGLang"):
            from kunserve_sglang.sglang_seam import server
            from kunserve_sglang.sglang_seam.compatibility import check_transport
            from kunserve_sglang.sglang_seam.identity import identity_of

            server.preload(wanted_device(self._argv))
            server_args = server.parse_server_args(
                with_api_key(self._options, self._argv),
                self._options.memory_budget,
                self._console.note,
            )
            check_transport(self._config.transport, server_args.device)
            gpus = server.gpus_for(
                server_args, self._config.num_instances, self._options.memory_budget
            )
        prompts = None
        if self._config.dispatch is DispatchPolicy.LMETRIC:
            prompts = server.prompt_format(server_args)
        identity = identity_of(server_args)
        self._start_router(self._router_config(server_args.api_key, prompts, identity))
        cpus = self._cores(self._config.num_instances, server_args.device)
        for number in range(self._config.num_instances):
            self._fleet.start(server_args, self._instance(number, cpus[number], gpus[number]))

    def _instance(self, number: int, cpus: tuple[int, ...], gpu: int) -> InstanceConfig:
        config, keys = self._config, self._keys
        return InstanceConfig(
            instance=number,
            url=f"http://127.0.0.1:{free_port()}",
            control_address=self._control_address,
            data_socket=f"{self._folder}/data-{number}",
            memory_budget=self._options.memory_budget,
            owners=config.largest_group,
            cpus=cpus,
            gpu=gpu,
            data_address=f"tcp://{config.data_host}:*" if keys else "",
            keys=keys.members if keys else None,
            admin_key=self._standing.instance_admin_key,
        ).sharing(config)

    def _router_config(
        self,
        api_key: str | None,
        prompts: PromptFormat | None = None,
        model: ModelIdentity | None = None,
    ) -> RouterConfig:
        return RouterConfig(
            cluster=self._config,
            control_address=self._control_address,
            api_key=api_key,
            prompts=prompts,
            launcher=os.getpid(),
            model=model,
            keys=self._keys,
            instance_admin_key=self._standing.instance_admin_key,
            state_file=f"{self._state_folder}/router.json",
        )

    def _start_router(self, config: RouterConfig) -> None:
        self.find_router()
        self._router_process.start(config)

    def find_router(self) -> None:
        """By the socket that only this launcher knows."""
        url = f"unix://{launcher_socket(self._control_address)}"
        self._router = RouterClient(url, self._config.read_api_key)

    def _announce(self, instances: Sequence[InstanceStatus], service: ServiceStatus | None) -> None:
        slots = [i.slots.capacity for i in instances if i.slots is not UNSET]
        config = self._config
        about = (
            f"{config.num_instances} instances, {max(slots, default=0):,} token slots each, "
            f"overload policy {config.overload_policy}{_limits(service)}"
            if instances
            else "no instances; POST /workers adds SGLang servers"
        )
        url = http_url(config.host, self._router_process.port, config.scheme)
        self._console.ready(f"KunServe is ready: {url}  ({about})")

    def _look_at_router(self, *, answered: bool | None) -> None:
        """Keep it running."""
        self._router_process.look(answered=answered)

    def _broken(self) -> str:
        return self._router_process.failure

    def _stop(self) -> None:
        # Instances compute the answers that the router still waits for.
        self._router_process.ask_to_end()
        self._router_process.wait(self._config.stop_grace_s + GRACE_S, self._signals)
        self._fleet.ask_to_end(GRACE_S, self._signals)
        self._fleet.end()
        self._router_process.end()


def _limits(service: ServiceStatus | None) -> str:
    """What the policy goes by; empty if it asks for memory alone."""
    if service is None or not service.weighed:
        return ""
    return (
        f", limits {service.ttft_ms:,.0f} ms to the first token and {service.tpot_ms:,.0f} ms each"
    )
