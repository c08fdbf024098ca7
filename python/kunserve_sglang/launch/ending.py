"""How a launcher ends: one line for a refusal, and signals."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.core.processes import kill_descendants

GRACE_S = 10.0
"""How long all processes have to end in good order."""


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
