"""The one life of both launchers: start, wait until all serve, watch, stop."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence

from kunserve_sglang.api.client import RouterClient
from kunserve_sglang.api.errors import CallError
from kunserve_sglang.api.service import ServiceStatus
from kunserve_sglang.api.types import ClusterStatus, InstanceStatus
from kunserve_sglang.core.faults import FAULT_ENVIRONMENT, fault_file, faults_in
from kunserve_sglang.core.processes import (
    clean_up_after,
    divide_cpus,
    granted_cpus,
    schedulers_on,
)
from kunserve_sglang.launch.console import Console, Step
from kunserve_sglang.launch.ending import GRACE_S, StopSignals
from kunserve_sglang.launch.fleet import Fleet
from kunserve_sglang.launch.keeper import Keeper
from kunserve_sglang.launch.options import LaunchOptions
from kunserve_sglang.launch.ready_file import ReadyFile

_POLL_S = 0.1
_STATUS_INTERVAL_S = 2.0
_STATUS_TIMEOUT_S = 5.0
_READY_TIMEOUT_S = 600.0


class Life(ABC):
    """Owns all processes that one launcher starts on this host."""

    goes_on_alone: bool
    """Whether there is something to watch when all instances have left in good order."""

    _router: RouterClient
    """To be set before anything is waited for."""

    def __init__(self, options: LaunchOptions) -> None:
        self._restart_limit = options.restart_limit
        self._signals = StopSignals()
        self._console = Console()
        self._ready_file = options.ready_file
        self._folder = ""
        self._others: list[int] = []
        self._fleet = Fleet("", self._console)

    def run(self) -> int:
        """Serve until a signal or until nothing is left to serve; returns the exit status.

        Raises `ConfigurationError` or `CallError` if it cannot begin.
        """
        faults_in(os.environ)
        self._check()
        self._ready = ReadyFile(self._ready_file)
        self._folder = tempfile.mkdtemp(prefix="kunserve-")
        clean_up_after(self._folder)
        self._fleet = Fleet(self._folder, self._console)
        self._signals.listen()
        try:
            self._start()
            if fault_file(os.environ) is None:
                os.environ.pop(FAULT_ENVIRONMENT, None)  # what is started again has had its faults
            keeper = Keeper(self._fleet, self._restart_limit, self._console)
            if not self._wait_until_ready(keeper):
                return 0 if self._signals.stop else 1
            status = self._watch(keeper)
            self._ready.show(False)
            if self._signals.stop and not self._signals.at_once:
                self._leave()
            return status
        finally:
            with self._console.step("stopping"):
                self._ready.show(False)
                self._stop()
            shutil.rmtree(self._folder, ignore_errors=True)

    # -- what differs ----------------------------------------------------------------------------

    @abstractmethod
    def _check(self) -> None:
        """Raise what can be known before anything is started."""

    @abstractmethod
    def _start(self) -> None:
        """Start all processes, and put the instances into the fleet."""

    @abstractmethod
    def _announce(self, instances: Sequence[InstanceStatus], service: ServiceStatus | None) -> None:
        """All of these, which are ours, are serving."""

    @abstractmethod
    def _look_at_router(self, *, answered: bool | None) -> None:
        """`answered` says whether it has when it was asked last; None: it was not asked yet."""

    def _broken(self) -> str:
        """Why nothing can go on, whatever the instances do; empty if it can."""
        return ""

    def _leave(self) -> None:
        """After a first signal, before all is stopped."""
        self._fleet.report()

    def _stop(self) -> None:
        """End all processes: ask, wait a little, then insist."""
        self._fleet.ask_to_end(GRACE_S, self._signals)
        self._fleet.end()

    # -- what both do ----------------------------------------------------------------------------

    def _cores(self, instances: int, device: str) -> list[tuple[int, ...]]:
        """Those of each instance; whether others use them matters on CPUs, once all serve."""
        cpus = granted_cpus()
        if device == "cpu":
            self._others = schedulers_on(cpus)
        return divide_cpus(instances, cpus)

    def _tell_of_others(self) -> None:
        if self._others:
            self._console.error(
                f"other schedulers may use the same cores (processes "
                f"{', '.join(map(str, self._others))}): they and these wait for one another at "
                "every step, many times as long; give each launcher cores of its own (taskset -c)"
            )

    def _wait_until_ready(self, keeper: Keeper) -> bool:
        """False after a signal, a failure (which is told), or too long a time.

        An instance that ends by itself is a failure, one that gets nowhere is started again.
        """
        total = len(self._fleet.numbers)
        things = f"{total} instance{'' if total == 1 else 's'}" if total else "the router"
        deadline = time.monotonic() + _READY_TIMEOUT_S
        with self._console.step(f"starting {things}") as step:
            while not self._signals.stop and time.monotonic() < deadline:
                if why := self._broken() or self._fleet.failure(but=keeper.ending):
                    self._console.error(why)
                    return False
                status = self._status()
                self._look_at_router(answered=status is not None)
                if self._is_ready(status, step):
                    return True
                keeper.look(status)
                time.sleep(_POLL_S)
        if not self._signals.stop:
            self._console.error(f"not ready within {_READY_TIMEOUT_S:.0f} s")
        return False

    def _is_ready(self, status: ClusterStatus | None, step: Step) -> bool:
        """Whether the router answers and all instances are serving; then it says so."""
        numbers = self._fleet.numbers
        ours = [i for i in status.instances if i.id in numbers] if status else []
        serving = sum(i.serving for i in ours)
        step.update(f"{len(ours)} of {len(numbers)} loaded, {serving} serving")
        if status is None or serving < len(numbers):
            return False
        self._announce(ours, status.service)
        self._tell_of_others()
        self._ready.show(True)
        return True

    def _watch(self, keeper: Keeper) -> int:
        """Until a signal, or until there is nothing to watch any more."""
        status: ClusterStatus | None = None
        answered: bool | None = None
        next_status = 0.0
        while not self._signals.stop:
            if why := self._broken():
                self._console.error(why)
                return 1
            self._fleet.report()
            if (self._restart_limit or self._ready.wanted) and time.monotonic() >= next_status:
                status = self._status()
                answered = status is not None
                next_status = time.monotonic() + _STATUS_INTERVAL_S
                self._ready.follow(status, self._fleet.numbers - self._fleet.left)
            self._look_at_router(answered=answered)
            keeper.look(status)
            if keeper.done and self._fleet.left < self._fleet.numbers:
                self._console.error("no instance is left")
                return 1
            if keeper.done and not self.goes_on_alone:
                return 0
            time.sleep(_POLL_S)
        return 0

    def _status(self) -> ClusterStatus | None:
        """None if the router is not up yet, or away for a moment: the caller asks again."""
        try:
            answer = self._router.call("status", timeout_s=_STATUS_TIMEOUT_S)
            return answer.read(ClusterStatus)
        except CallError:
            return None
