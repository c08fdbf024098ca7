"""What both launchers share: the budget, one line for a refusal, the wait for all, signals."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

import psutil

from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.core.processes import kill_descendants
from kunserve_sglang.core.settings import format_size, parse_size
from kunserve_sglang.core.sglang_flags import wanted_device
from kunserve_sglang.launch.console import Console, Step

_MEMORY_SHARE = 0.5
"""Share of the free memory that instances take together when no budget is given."""

GRACE_S = 10.0
"""How long all processes have to end in good order."""

_READY_TIMEOUT_S = 600.0


def add_budget_flag(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--memory-budget",
        metavar="SIZE",
        help="parameters + KV of one instance, e.g. 448MiB (default: half of the free memory, "
        "divided among the instances; on a GPU SGLang's --mem-fraction-static of what is free)",
    )


def memory_budget(flags: argparse.Namespace, sglang_argv: Sequence[str]) -> int:
    """Bytes of one instance; 0 leaves it to the instance, which then has a GPU for itself.

    Raises `ConfigurationError` for what is no size.
    """
    if flags.memory_budget:
        return parse_size(flags.memory_budget)
    if flags.num_instances < 1 or wanted_device(sglang_argv) != "cpu":
        return 0
    budget = int(psutil.virtual_memory().available * _MEMORY_SHARE / flags.num_instances)
    print(f"kunserve: --memory-budget not given, using {format_size(budget)} an instance")
    return budget


def end_with(work: Callable[[], int], *refusals: type[Exception]) -> NoReturn:
    """End the process with the status that `work` returns.

    It is 2 after a `ConfigurationError` or one of `refusals`, with one line that says why.
    """
    one_line: tuple[type[Exception], ...] = (ConfigurationError, *refusals)
    try:
        status = work()
    except one_line as error:
        print(f"kunserve: {error}", file=sys.stderr)
        status = 2
    sys.stdout.flush()
    # Not sys.exit: nothing that SGLang registered for the end of its own processes may run here.
    os._exit(status)


class StopSignals:
    """SIGINT and SIGTERM: the first asks for an end in good order, the second ends at once."""

    def __init__(self) -> None:
        self._count = 0

    def listen(self) -> None:
        """From now on, for good."""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)

    @property
    def stop(self) -> bool:
        """Whether to end, either way."""
        return self._count > 0

    @property
    def at_once(self) -> bool:
        """Whether to wait for nothing any more; all descendants have been killed."""
        return self._count > 1

    def _on_signal(self, _number: int, _frame: object) -> None:
        self._count += 1
        if self.at_once:
            kill_descendants()


def wait_until_ready(
    title: str,
    ready: Callable[[Step], bool],
    failure: Callable[[], str],
    *,
    console: Console,
    signals: StopSignals,
    poll_s: float,
) -> bool:
    """Ask until `ready`; false after a signal, a `failure` (which is told) or too long a time."""
    deadline = time.monotonic() + _READY_TIMEOUT_S
    with console.step(title) as step:
        while not signals.stop and time.monotonic() < deadline:
            if why := failure():
                console.error(why)
                return False
            if ready(step):
                return True
            time.sleep(poll_s)
    if not signals.stop:
        console.error(f"not ready within {_READY_TIMEOUT_S:.0f} s")
    return False
