"""What can go wrong for a command, and what the shell is told of it."""

from __future__ import annotations

from enum import IntEnum

from kunserve_sglang.core.errors import KunServeError


class Exit(IntEnum):
    """Statuses of the process; 130 is what shells expect of one that Ctrl-C has ended."""

    OK = 0
    REFUSED = 1
    USAGE = 2
    UNREACHABLE = 3
    INTERRUPTED = 130


class CommandError(KunServeError):
    """Ends the command with one line on stderr and `exit`."""

    exit = Exit.REFUSED


class Refused(CommandError):
    """The router has answered, and it says no."""


class Usage(CommandError):
    """The command line makes no sense; the router was not asked."""

    exit = Exit.USAGE


class Unreachable(CommandError):
    """Nobody answered in time, or not a KunServe router."""

    exit = Exit.UNREACHABLE
