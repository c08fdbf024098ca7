"""The instances that one launcher runs: forked from it, watched, and ended with it."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing as mp
import time
from collections.abc import Container
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any
from urllib.parse import urlsplit

import msgspec
import psutil

from kunserve_sglang.core.addresses import http_url
from kunserve_sglang.core.instance_config import InstanceConfig
from kunserve_sglang.core.processes import STACKS_SIGNAL, family, free_port, kill_descendants
from kunserve_sglang.launch.console import Console
from kunserve_sglang.launch.ending import StopSignals

_POLL_S = 0.1
_STACKS_S = 0.1


@dataclass(frozen=True, slots=True)
class Used:
    """CPU seconds, and bytes read from disks."""

    cpu_s: float
    read_bytes: int


@dataclass(slots=True)
class _Member:
    """One instance, with what it was started with: `server_args` are SGLang's."""

    server_args: Any
    config: InstanceConfig
    process: BaseProcess
    starts: int = 1
    reported: bool = False


class Fleet:
    """On CPUs instances are forked after SGLang has been imported once, which starts any number of
    them in the time of one. Every child dies with its parent, by request to the kernel, so that
    even `kill -9` of the launcher leaves nothing behind.
    """

    def __init__(self, folder: str, console: Console) -> None:
        """`folder` is for what instances leave on disk while they run."""
        self._folder = folder
        self._console = console
        self._members: dict[int, _Member] = {}

    @property
    def numbers(self) -> set[int]:
        return set(self._members)

    @property
    def running(self) -> set[int]:
        return {n for n, m in self._members.items() if m.process.is_alive()}

    @property
    def left(self) -> set[int]:
        """Those that have ended by leaving the cluster."""
        return {n for n, m in self._members.items() if m.process.exitcode == 0}

    def url(self, number: int) -> str:
        """Where the process listens that runs now, or has run last."""
        return self._members[number].config.url

    def start(self, server_args: Any, config: InstanceConfig) -> None:
        """Raises nothing: how it ended is found out by looking."""
        process = self._fork(server_args, config)
        self._members[config.instance] = _Member(server_args, config, process)

    def restart(self, number: int) -> None:
        """A new process under an old number; the router knows the two apart by their addresses."""
        member = self._members[number]
        host = urlsplit(member.config.url).hostname or ""
        member.config = msgspec.structs.replace(
            member.config,
            url=http_url(host, free_port(host)),
            data_socket=f"{self._folder}/data-{number}-{member.starts}",
        )
        member.starts += 1
        member.reported = False
        member.process = self._fork(member.server_args, member.config)

    def used(self, number: int) -> Used:
        """What the processes of one have used so far; nothing if it has ended."""
        cpu_s, read_bytes = 0.0, 0
        for process in family(self._members[number].process.pid):
            with contextlib.suppress(psutil.Error):
                times, disk = process.cpu_times(), process.io_counters()
                cpu_s += times.user + times.system
                read_bytes += disk.read_bytes
        return Used(cpu_s, read_bytes)

    def show_stacks(self, number: int) -> None:
        """Let the processes of one write to the log where their threads are, one after the other.

        That is waited for: a signal that ends them would overtake it.
        """
        for process in family(self._members[number].process.pid):
            with contextlib.suppress(psutil.Error):
                process.send_signal(STACKS_SIGNAL)
                time.sleep(_STACKS_S)

    def failure(self, but: Container[int]) -> str:
        """Why the start cannot succeed any more; empty while it can, whatever some do."""
        for number, member in self._members.items():
            if number not in but and not member.process.is_alive():
                code = member.process.exitcode
                return f"instance {number} ended with status {code} while starting"
        return ""

    def report(self) -> None:
        """Say who has ended since the last report, and how."""
        for number, member in self._members.items():
            if member.reported or member.process.is_alive():
                continue
            member.reported = True
            if code := member.process.exitcode:
                self._console.error(f"instance {number} ended with status {code}")
            else:
                self._console.note(f"instance {number} has left")

    def ask(self, number: int) -> None:
        """Ask one to end."""
        self._members[number].process.terminate()

    def kill(self, number: int) -> None:
        """End one now, with all that it has started."""
        process = self._members[number].process
        if process.pid is not None and process.is_alive():
            kill_descendants(process.pid)
            process.kill()

    def ask_to_end(self, seconds: float, signals: StopSignals) -> None:
        """Ask all of them, and wait so long for it, unless `signals` say not to."""
        for number in self.running:
            self.ask(number)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.wait(_POLL_S):
            if signals.at_once:
                break

    def wait(self, seconds: float) -> bool:
        """Until all have ended; false if that takes longer."""
        deadline = time.monotonic() + seconds
        while self.running:
            if time.monotonic() >= deadline:
                return False
            time.sleep(min(_POLL_S, seconds))
        return True

    def end(self) -> None:
        """Now, with everything else that this process has started."""
        kill_descendants()
        for member in self._members.values():
            member.process.join(5)

    def _fork(self, server_args: Any, config: InstanceConfig) -> BaseProcess:
        from kunserve_sglang.sglang_seam import server

        # Children share these pages for as long as nobody writes to them.
        gc.collect()
        gc.freeze()
        # A forked process could not use a GPU.
        context: Any = mp.get_context("fork" if server_args.device == "cpu" else "spawn")
        process: BaseProcess = context.Process(
            target=server.run_instance,
            args=(server_args, config, self._folder),
            name=f"kunserve-instance-{config.instance}",
        )
        process.start()
        return process
