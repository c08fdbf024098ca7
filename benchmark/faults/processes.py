"""Processes that are struck, and where they stand still for it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

from benchmark.experiment import RunError
from kunserve_sglang.core.processes import family

_POLL_S = 0.002
_LISTENING = "0A"
"""In the kernel's tables."""


def send(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    """A signal to all that are still there."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def router_of(launcher: int) -> psutil.Process:
    """The router process that it runs now; raises `RunError` unless there is one.

    Before it has loaded anything it is called by its command, and later by a name of its own.
    """
    names = ("kunserve_sglang.router", "kunserve::router")
    found = [
        p
        for p in family(launcher)[1:]
        if any(name in _words(p) for name in names) and not _has_ended(p)
    ]
    if len(found) != 1:
        raise RunError(f"there are {len(found)} routers")
    return found[0]


def instance_family(launcher: int, url: str) -> list[psutil.Process]:
    """All processes of the instance that listens at `url`; raises `RunError` if none does."""
    port = int(url.rsplit(":", 1)[1])
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(launcher).children():
            if _listens(child, port):
                return [child, *child.children(recursive=True)]
    raise RunError(f"nobody listens at {url}")


def scheduler_of(processes: Iterable[psutil.Process]) -> psutil.Process:
    """Raises `RunError` unless there is one."""
    found = [p for p in processes if "scheduler" in _words(p)]
    if len(found) != 1:
        raise RunError(f"an instance has {len(found)} schedulers")
    return found[0]


def _listens(process: psutil.Process, port: int) -> bool:
    """In the network that it is in, which may be another one than ours."""
    folder = Path(f"/proc/{process.pid}")
    with contextlib.suppress(OSError):
        rows = [line.split() for line in (folder / "net" / "tcp").read_text().splitlines()[1:]]
        sockets = {
            f"socket:[{row[9]}]"
            for row in rows
            if row[3] == _LISTENING and int(row[1].rpartition(":")[2], 16) == port
        }
        return any(str(fd.readlink()) in sockets for fd in (folder / "fd").iterdir())
    return False


def _has_ended(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    return True


def _words(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def stopped(pid: int) -> bool:
    """Whether it stands still by SIGSTOP; false if it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] == "T"


class GateFile:
    """The file of `KUNSERVE_FAULT=@FILE`: where a process is to stand still, or nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.open()

    def open(self) -> None:
        """Nobody is to stand still."""
        self._write("")

    def shut(self, point: str, nth: int, instance: int | None) -> None:
        """At the `nth` reach of `point` from now on, in this instance or in the router."""
        where = "" if instance is None else f":{instance}"
        self._write(f"{point}:hang:{nth}{where}")

    def _write(self, text: str) -> None:
        new = self.path.with_suffix(f".{os.getpid()}")
        new.write_text(text)
        new.replace(self.path)


async def stands_still(pid: int, limit_s: float) -> bool:
    """Wait until a process does; false if it has not by then."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if stopped(pid):
            return True
        await asyncio.sleep(_POLL_S)
    return False
