"""Small facts about processes and hosts that several rooms need."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import random
import shutil
import signal
import socket
from collections.abc import Collection, Sequence
from itertools import pairwise
from pathlib import Path

import psutil

from kunserve_sglang.core.control_groups import cpu_shares

STACKS_SIGNAL = signal.SIGUSR2
"""Lets a process of an instance write the stacks of its threads to the log, even if it hangs."""

_SCHEDULER = "sglang::scheduler"
"""How SGLang calls its processes."""

_PR_SET_PDEATHSIG = 1

_MIN_PORT = 2048
_PORTS = 16_384
_given_ports: set[int] = set()


def die_with_parent(number: signal.Signals) -> None:
    """Ask the kernel to send this process a signal when its parent ends, however it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number))


def show_stacks_when_asked() -> None:
    """Obey `STACKS_SIGNAL`, which ends processes that do not."""
    faulthandler.register(STACKS_SIGNAL)


def spin_shortly() -> None:
    """Let the threads of OpenMP wait for each other asleep. To be called before torch is imported.

    They meet some hundred times a step. By default they spin for milliseconds first, and if one has
    lost its core to another program, as to an instance that was started by itself, every meeting
    takes a turn of the operating system's. What the user has set stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def compile_nothing() -> None:
    """Let torch run what SGLang compiles. To be called before SGLang is imported, on CPUs.

    That is a few small functions of the sampler, such as the repetition penalty. Compiling one at
    its first request holds up all others for as long as a C++ compiler takes, if there is one; and
    what is kept in /tmp from another CPU has loops of another width, which write past the ends of
    tensors. What the user has set stays.
    """
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def family(pid: int | None = None) -> list[psutil.Process]:
    """A process (without `pid`: this one), then its descendants; empty if it has ended."""
    try:
        head = psutil.Process(pid)
        return [head, *head.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill_descendants(pid: int | None = None) -> None:
    """SIGKILL to all that a process has started (without `pid`: this one), and what these have.

    Python's resource trackers are spared: they remove what others leave, then end themselves.
    """
    for child in family(pid)[1:]:
        try:
            if not any("resource_tracker" in word for word in child.cmdline()):
                child.kill()
        except psutil.NoSuchProcess:
            continue


def divide_cpus(parts: int, cpus: Sequence[int] = ()) -> list[tuple[int, ...]]:
    """`cpus`, or the cores of this process, in `parts` disjoint sets, as even as possible.

    Parts share cores when there are more of them than cores.
    """
    cpus = cpus or sorted(os.sched_getaffinity(0))
    if len(cpus) < parts:
        return [(cpus[i % len(cpus)],) for i in range(parts)]
    edges = [round(i * len(cpus) / parts) for i in range(parts + 1)]
    return [tuple(cpus[lo:hi]) for lo, hi in pairwise(edges)]


def granted_cpus() -> list[int]:
    """Cores of this process, as many as its control groups give it time for.

    A thread on each of more cores than that would be stopped again and again, and all wait for the
    last one. Which ones it is chance: other containers of the host choose from the same.
    """
    cpus = sorted(os.sched_getaffinity(0))
    granted = max(1, int(min(cpu_shares(), default=len(cpus))))
    begin = random.randrange(max(0, len(cpus) - granted) + 1)
    return cpus[begin : begin + granted]


def schedulers_on(cpus: Collection[int]) -> list[int]:
    """The process ids of SGLang's schedulers on this host that may use some of these cores."""
    wanted, found = set(cpus), []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, IndexError):
            if not process.cmdline()[0].startswith(_SCHEDULER):
                continue
            if not wanted.isdisjoint(process.cpu_affinity()):
                found.append(process.pid)
    return found


def this_host() -> str:
    """The same for all processes of one running kernel that see the same files.

    Containers of one host do not: a socket of another one cannot be found.
    """
    kernel = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    files = Path("/proc/self/ns/mnt").stat().st_ino
    return f"{kernel}-{files}"


def within_reach(host: str, here: str, path: str) -> bool:
    """Whether a socket at `path` on `host` can be used from `here`."""
    return host == here and Path(path).exists()


def clean_up_after(folder: str) -> None:
    """Fork a process that removes `folder` when this one and all that it forks have ended.

    However they end: it waits for the end of a pipe that nobody else reads. To be called before
    there are threads.
    """
    waits, held = os.pipe()
    if os.fork():
        os.close(waits)
        os.set_inheritable(held, False)
        return
    os.close(held)
    os.setpgid(0, 0)  # out of reach of Ctrl-C
    os.read(waits, 1)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port on an address of this host that nobody listens on now; another one each time.

    It is below those that the kernel hands out: instances load a model before they listen, while
    processes beside them open many sockets on whatever port they are given.
    """
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    candidates = [*range(max(_MIN_PORT, lowest - _PORTS), lowest)]
    random.shuffle(candidates)
    for port in (*candidates, 0):
        if port in _given_ports:
            continue
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe,
        ):
            probe.bind((host, port))
            found: int = probe.getsockname()[1]
            _given_ports.add(found)
            return found
    raise OSError(f"no free port at {host}")
