"""Small facts about processes and hosts that several rooms need."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
from itertools import pairwise

_PR_SET_PDEATHSIG = 1


def die_with_parent(number: signal.Signals) -> None:
    """Ask the kernel to send this process a signal when its parent ends, however it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number))


def divide_cpus(parts: int) -> list[tuple[int, ...]]:
    """The cores of this process in `parts` disjoint sets, as even as possible.

    Parts share cores when there are more of them than cores.
    """
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < parts:
        return [(cpus[i % len(cpus)],) for i in range(parts)]
    edges = [round(i * len(cpus) / parts) for i in range(parts + 1)]
    return [tuple(cpus[lo:hi]) for lo, hi in pairwise(edges)]


def free_port() -> int:
    """A TCP port on the loopback address that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
