"""The exit statuses of `kunserve`."""

from __future__ import annotations

from enum import IntEnum

from kunserve_sglang.api.errors import CallError, Unreachable, Usage


class Exit(IntEnum):
    """Statuses of the process; 130 is what shells expect of one that Ctrl-C has ended."""

    OK = 0
    REFUSED = 1
    USAGE = 2
    UNREACHABLE = 3
    INTERRUPTED = 130


def exit_after(error: CallError) -> Exit:
    """The status of a command that `error` has ended."""
    match error:
        case Usage():
            return Exit.USAGE
        case Unreachable():
            return Exit.UNREACHABLE
        case _:
            return Exit.REFUSED
