"""The launcher's life: start router and instances, watch them, end everything.

Instances are forked from this process after SGLang has been imported once, which starts any
number of them in the time of one. Every child dies with its parent, by request to the kernel, so
that even `kill -9` of the launcher leaves nothing behind.
"""

from __future__ import annotations

import argparse
import gc
import http.client
import json
import multiprocessing as mp
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from typing import Any

import psutil

from kunserve_sglang.config import ClusterConfig, InstanceConfig, PromptFormat
from kunserve_sglang.console import Console
from kunserve_sglang.errors import ConfigurationError
from kunserve_sglang.policy.dispatch import DispatchPolicy
from kunserve_sglang.processes import divide_cpus, free_port
from kunserve_sglang.router.settings import CLUSTER_ENVIRONMENT, RouterConfig

_READY_TIMEOUT_S = 600.0
_GRACE_S = 10.0
_POLL_S = 0.1


class Supervisor:
    """Owns all processes of a cluster on this host."""

    def __init__(self, config: ClusterConfig, sglang_argv: list[str]) -> None:
        self._config = config
        self._argv = sglang_argv
        self._folder = ""
        self._router: subprocess.Popen[bytes] | None = None
        self._instances: list[BaseProcess] = []
        self._stopping = 0
        self._console = Console()

    def run(self) -> int:
        """Serve until a signal or until nothing is left to serve; returns the exit status.

        Raises `ConfigurationError` before anything was started.
        """
        alone = not self._config.num_instances
        api_key = _api_key_only(self._argv) if alone else None
        _check_port_free(self._config.host, self._config.port)
        self._folder = tempfile.mkdtemp(prefix="kunserve-")
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        try:
            if alone:
                self._start_router(api_key)
            else:
                self._start_all()
            if not self._wait_until_ready():
                return 0 if self._stopping else 1
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

            server.preload()
            server_args = server.parse_server_args(self._argv)
        prompts = None
        if self._config.dispatch is DispatchPolicy.LMETRIC:
            prompts = server.prompt_format(server_args)
        self._start_router(server_args.api_key, prompts)
        # Children share these pages for as long as nobody writes to them.
        gc.collect()
        gc.freeze()
        context = mp.get_context("fork")
        cpus = divide_cpus(self._config.num_instances)
        for number in range(self._config.num_instances):
            port = free_port()
            instance = InstanceConfig(
                instance=number,
                url=f"http://127.0.0.1:{port}",
                control_address=self._control_address,
                data_socket=f"{self._folder}/data-{number}",
                memory_budget=self._config.memory_budget,
                owners=min(self._config.num_instances, self._config.max_group_size),
                cpus=cpus[number],
                overload_policy=self._config.overload_policy,
                micro_batches=self._config.micro_batches,
                peer_timeout_s=self._config.peer_timeout_s,
            )
            process = context.Process(
                target=server.run_instance,
                args=(server_args, instance, port, self._folder),
                name=f"kunserve-instance-{number}",
            )
            process.start()
            self._instances.append(process)

    def _start_router(self, api_key: str | None, prompts: PromptFormat | None = None) -> None:
        config = RouterConfig(
            cluster=self._config,
            control_address=self._control_address,
            api_key=api_key,
            prompts=prompts,
            launcher=os.getpid(),
            runtime_folder=self._folder,
        )
        environment = {**os.environ, CLUSTER_ENVIRONMENT: config.to_environment()}
        self._router = subprocess.Popen(
            [sys.executable, "-m", "kunserve_sglang.router"],
            env=environment,
            process_group=0,
        )

    def _wait_until_ready(self) -> bool:
        total = self._config.num_instances
        deadline = time.monotonic() + _READY_TIMEOUT_S
        title = f"starting {total} instances" if total else "starting the router"
        with self._console.step(title) as step:
            while not self._stopping and time.monotonic() < deadline:
                failure = self._failure()
                if failure:
                    self._console.error(failure)
                    return False
                status = self._ask("/kunserve/status")
                own = [i for i in status["instances"] if not i["plain"]] if status else []
                serving = [i for i in own if i["serving"]]
                step.update(f"{len(own)} of {total} loaded, {len(serving)} serving")
                if status is not None and len(serving) == total:
                    self._announce(own)
                    return True
                time.sleep(_POLL_S)
        if not self._stopping:
            self._console.error(f"not ready within {_READY_TIMEOUT_S:.0f} s")
        return False

    def _announce(self, instances: list[dict[str, Any]]) -> None:
        slots = [i["slots"]["capacity"] for i in instances if "slots" in i]
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
        reported: set[int] = set()
        while not self._stopping:
            if self._router is not None and self._router.poll() is not None:
                self._console.error(f"the router ended with status {self._router.returncode}")
                return 1
            dead = [i for i, p in enumerate(self._instances) if not p.is_alive()]
            for number in set(dead) - reported:
                code = self._instances[number].exitcode
                if code:
                    self._console.error(f"instance {number} ended with status {code}")
                else:
                    self._console.note(f"instance {number} has left")
                reported.add(number)
            crashed = any(p.exitcode for p in self._instances)
            if crashed and len(dead) == len(self._instances):
                self._console.error("no instance is left")
                return 1
            time.sleep(_POLL_S)
        return 0

    def _failure(self) -> str:
        """Why the start cannot succeed any more; empty while it can."""
        if self._router is not None and self._router.poll() is not None:
            return f"the router ended with status {self._router.returncode}"
        for number, process in enumerate(self._instances):
            if not process.is_alive():
                return f"instance {number} ended with status {process.exitcode} while starting"
        return ""

    def _ask(self, path: str) -> dict[str, Any] | None:
        host = "127.0.0.1" if self._config.host == "0.0.0.0" else self._config.host
        connection = http.client.HTTPConnection(host, self._config.port, timeout=5)
        try:
            key = self._config.read_api_key
            headers = {"Authorization": f"Bearer {key}".encode()} if key else {}
            connection.request("GET", path, headers=headers)
            answer: dict[str, Any] = json.loads(connection.getresponse().read())
        except (OSError, http.client.HTTPException, json.JSONDecodeError):
            return None  # not up yet; the caller asks again
        finally:
            connection.close()
        return answer

    # -- stop ------------------------------------------------------------------------------------

    def _on_signal(self, _number: int, _frame: object) -> None:
        self._stopping += 1
        if self._stopping > 1:
            self._kill_all()

    def _stop(self) -> None:
        """End all processes: ask, wait a little, then insist; remove the runtime folder."""
        with self._console.step("stopping"):
            if self._router is not None and self._router.poll() is None:
                self._router.terminate()
            for process in self._instances:
                if process.is_alive():
                    process.terminate()
            deadline = time.monotonic() + _GRACE_S
            while time.monotonic() < deadline and any(p.is_alive() for p in self._instances):
                if self._stopping > 1:
                    break
                time.sleep(_POLL_S)
            self._kill_all()
            for process in self._instances:
                process.join(5)
            if self._router is not None:
                self._router.wait(5)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _kill_all(self) -> None:
        """SIGKILL to everything this launcher has started, children of children included.

        Python's resource trackers are spared: they remove what others leave, then end themselves.
        """
        for child in psutil.Process().children(recursive=True):
            try:
                if not any("resource_tracker" in word for word in child.cmdline()):
                    child.kill()
            except psutil.NoSuchProcess:
                continue


def _api_key_only(argv: list[str]) -> str | None:
    """The one flag of SGLang's that a router without instances has a use for.

    Raises `ConfigurationError` for any other.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--api-key")
    flags, rest = parser.parse_known_args(argv)
    if rest:
        raise ConfigurationError(f"{rest[0]}: with --num-instances 0 there is no instance for it")
    api_key: str | None = flags.api_key
    return api_key


def _check_port_free(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigurationError(f"cannot listen on {host}:{port}: {error.strerror}") from None
