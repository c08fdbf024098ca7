"""The launcher's life: start router and instances, watch them, end everything."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time

from msgspec import UNSET

from kunserve_sglang.api.client import RouterClient
from kunserve_sglang.api.errors import CallError
from kunserve_sglang.api.types import ClusterStatus, InstanceStatus
from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.core.identity import ModelIdentity
from kunserve_sglang.core.keys import new_admin_key, new_keys
from kunserve_sglang.core.processes import divide_cpus, free_port
from kunserve_sglang.core.settings import (
    ClusterConfig,
    DispatchPolicy,
    InstanceConfig,
    PromptFormat,
    shared_settings,
)
from kunserve_sglang.core.sglang_flags import api_key_only, wanted_device
from kunserve_sglang.launch.console import Console, Step
from kunserve_sglang.launch.fleet import Fleet
from kunserve_sglang.launch.lifecycle import GRACE_S, StopSignals, wait_until_ready
from kunserve_sglang.router.settings import CLUSTER_ENVIRONMENT, RouterConfig

_POLL_S = 0.1
_STATUS_TIMEOUT_S = 5.0


class Supervisor:
    """Owns all processes of a cluster on this host."""

    def __init__(self, config: ClusterConfig, sglang_argv: list[str]) -> None:
        self._config = config
        self._argv = sglang_argv
        self._folder = ""
        self._router: subprocess.Popen[bytes] | None = None
        self._signals = StopSignals()
        self._console = Console()
        self._fleet = Fleet("", self._console)
        self._keys = new_keys() if config.data_host else None
        self._instance_admin_key = new_admin_key()

    def run(self) -> int:
        """Serve until a signal or until nothing is left to serve; returns the exit status.

        Raises `ConfigurationError` before anything was started.
        """
        alone = not self._config.num_instances
        api_key = api_key_only(self._argv) if alone else None
        _check_port_free(self._config.host, self._config.port)
        self._folder = tempfile.mkdtemp(prefix="kunserve-")
        self._fleet = Fleet(self._folder, self._console)
        self._signals.listen()
        try:
            if alone:
                self._start_router(api_key)
            else:
                self._start_all()
            if not self._wait_until_ready():
                return 0 if self._signals.stop else 1
            return self._watch()
        finally:
            self._stop()

    # -- start -----------------------------------------------------------------------------------

    @property
    def _control_address(self) -> str:
        return f"ipc://{self._folder}/control"

    def _start_all(self) -> None:
        with self._console.step("importing SGLang"):
            from kunserve_sglang.sglang_seam import server
            from kunserve_sglang.sglang_seam.compatibility import check_transport
            from kunserve_sglang.sglang_seam.identity import identity_of

            server.preload(wanted_device(self._argv))
            server_args = server.parse_server_args(self._argv)
            check_transport(self._config.transport, server_args.device)
            gpus = server.gpus_for(
                server_args, self._config.num_instances, self._config.memory_budget
            )
        prompts = None
        if self._config.dispatch is DispatchPolicy.LMETRIC:
            prompts = server.prompt_format(server_args)
        self._start_router(server_args.api_key, prompts, identity_of(server_args))
        cpus = divide_cpus(self._config.num_instances)
        for number in range(self._config.num_instances):
            self._fleet.start(server_args, self._instance(number, cpus[number], gpus[number]))

    def _instance(self, number: int, cpus: tuple[int, ...], gpu: int) -> InstanceConfig:
        config, keys = self._config, self._keys
        return InstanceConfig(
            instance=number,
            url=f"http://127.0.0.1:{free_port()}",
            control_address=self._control_address,
            data_socket=f"{self._folder}/data-{number}",
            memory_budget=config.memory_budget,
            owners=config.largest_group,
            cpus=cpus,
            gpu=gpu,
            **shared_settings(config),
            data_address=f"tcp://{config.data_host}:*" if keys else "",
            keys=keys.members if keys else None,
            admin_key=self._instance_admin_key,
        )

    def _start_router(
        self,
        api_key: str | None,
        prompts: PromptFormat | None = None,
        model: ModelIdentity | None = None,
    ) -> None:
        config = RouterConfig(
            cluster=self._config,
            control_address=self._control_address,
            api_key=api_key,
            prompts=prompts,
            launcher=os.getpid(),
            runtime_folder=self._folder,
            model=model,
            keys=self._keys,
            instance_admin_key=self._instance_admin_key,
        )
        environment = {**os.environ, CLUSTER_ENVIRONMENT: config.to_environment()}
        self._router = subprocess.Popen(
            [sys.executable, "-m", "kunserve_sglang.router"],
            env=environment,
            process_group=0,
        )

    def _wait_until_ready(self) -> bool:
        total = self._config.num_instances
        return wait_until_ready(
            f"starting {total} instances" if total else "starting the router",
            self._ready,
            self._failure,
            console=self._console,
            signals=self._signals,
            poll_s=_POLL_S,
        )

    def _ready(self, step: Step) -> bool:
        """Whether the router answers and all instances are serving; then it says so."""
        total = self._config.num_instances
        status = self._status()
        own = [i for i in status.instances if not i.plain] if status else []
        serving = [i for i in own if i.serving]
        step.update(f"{len(own)} of {total} loaded, {len(serving)} serving")
        if status is None or len(serving) < total:
            return False
        self._announce(own)
        return True

    def _announce(self, instances: list[InstanceStatus]) -> None:
        slots = [i.slots.capacity for i in instances if i.slots is not UNSET]
        config = self._config
        about = (
            f"{config.num_instances} instances, {max(slots, default=0):,} token slots each, "
            f"overload policy {config.overload_policy}"
            if instances
            else "no instances; POST /workers adds SGLang servers"
        )
        self._console.ready(f"KunServe is ready: http://{config.host}:{config.port}  ({about})")

    # -- watch -----------------------------------------------------------------------------------

    def _watch(self) -> int:
        while not self._signals.stop:
            if self._router is not None and self._router.poll() is not None:
                self._console.error(f"the router ended with status {self._router.returncode}")
                return 1
            self._fleet.report()
            # Once all have left in good order, others may still come.
            if self._fleet.crashed and not self._fleet.running:
                self._console.error("no instance is left")
                return 1
            time.sleep(_POLL_S)
        return 0

    def _failure(self) -> str:
        """Why the start cannot succeed any more; empty while it can."""
        if self._router is not None and self._router.poll() is not None:
            return f"the router ended with status {self._router.returncode}"
        return self._fleet.failure()

    def _status(self) -> ClusterStatus | None:
        host = "127.0.0.1" if self._config.host == "0.0.0.0" else self._config.host
        router = RouterClient(f"{host}:{self._config.port}", self._config.read_api_key)
        try:
            return router.call("status", timeout_s=_STATUS_TIMEOUT_S).read(ClusterStatus)
        except CallError:
            return None  # not up yet; the caller asks again

    # -- stop ------------------------------------------------------------------------------------

    def _stop(self) -> None:
        """End all processes: ask, wait a little, then insist; remove the runtime folder."""
        with self._console.step("stopping"):
            if self._router is not None and self._router.poll() is None:
                self._router.terminate()
            deadline = time.monotonic() + GRACE_S
            self._fleet.ask_to_end(GRACE_S, self._signals)
            if self._router is not None:
                # Answers of servers that are not ours may still be under way.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._router.wait(max(0.0, deadline - time.monotonic()))
            self._fleet.end()
            if self._router is not None:
                self._router.wait(5)
        shutil.rmtree(self._folder, ignore_errors=True)


def _check_port_free(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigurationError(f"cannot listen on {host}:{port}: {error.strerror}") from None
