"""The instances that one launcher runs: forked from it, watched, and ended with it."""

from __future__ import annotations

import gc
import multiprocessing as mp
import time
from multiprocessing.process import BaseProcess
from typing import Any

from kunserve_sglang.core.processes import kill_descendants
from kunserve_sglang.core.settings import InstanceConfig
from kunserve_sglang.launch.console import Console
from kunserve_sglang.launch.lifecycle import StopSignals

_POLL_S = 0.1


class Fleet:
    """On CPUs instances are forked after SGLang has been imported once, which starts any number of
    them in the time of one. Every child dies with its parent, by request to the kernel, so that
    even `kill -9` of the launcher leaves nothing behind.
    """

    def __init__(self, folder: str, console: Console) -> None:
        """`folder` is for what instances leave on disk while they run."""
        self._folder = folder
        self._console = console
        self._processes: dict[int, BaseProcess] = {}
        self._reported: set[int] = set()

    def __len__(self) -> int:
        return len(self._processes)

    @property
    def numbers(self) -> set[int]:
        return set(self._processes)

    @property
    def running(self) -> set[int]:
        return {n for n, p in self._processes.items() if p.is_alive()}

    @property
    def crashed(self) -> bool:
        """Whether one has ended otherwise than by leaving the cluster."""
        return any(p.exitcode for p in self._processes.values())

    def start(self, server_args: Any, instance: InstanceConfig) -> None:
        """Raises nothing: how it ended is found out by looking."""
        from kunserve_sglang.sglang_seam import server

        # Children share these pages for as long as nobody writes to them.
        gc.collect()
        gc.freeze()
        # A forked process could not use a GPU.
        context: Any = mp.get_context("fork" if server_args.device == "cpu" else "spawn")
        process = context.Process(
            target=server.run_instance,
            args=(server_args, instance, self._folder),
            name=f"kunserve-instance-{instance.instance}",
        )
        process.start()
        self._processes[instance.instance] = process

    def failure(self) -> str:
        """Why the start cannot succeed any more; empty while it can."""
        for number, process in self._processes.items():
            if not process.is_alive():
                return f"instance {number} ended with status {process.exitcode} while starting"
        return ""

    def report(self) -> None:
        """Say who has ended since the last report, and how."""
        for number in self.numbers - self.running - self._reported:
            self._reported.add(number)
            if code := self._processes[number].exitcode:
                self._console.error(f"instance {number} ended with status {code}")
            else:
                self._console.note(f"instance {number} has left")

    def ask_to_end(self, seconds: float, signals: StopSignals) -> None:
        """Ask all of them, and wait so long for it, unless `signals` say not to."""
        for process in self._processes.values():
            if process.is_alive():
                process.terminate()
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
        for process in self._processes.values():
            process.join(5)
