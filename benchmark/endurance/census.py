"""What the processes of a cluster hold: memory, files, threads; and what lies about on the host."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

from benchmark.experiment import RunError
from benchmark.faults.cluster import FaultedCluster
from kunserve_sglang.core.processes import family

MEASURES = ("private_mib", "shared_mib", "files", "threads")
_ROLES = {
    "kunserve::router": "router",
    "sglang::scheduler": "scheduler",
    "sglang::detokenizer": "detokenizer",
}
_SHARED_MEMORY = Path("/dev/shm")


class Life(NamedTuple):
    """One process, by when it began, so that a number that is used again is another one."""

    role: str
    pid: int
    began: float


Samples = defaultdict[str, defaultdict[Life, list[tuple[float, float]]]]
"""By measure and life: seconds, value."""


class Census:
    """Counts again and again; times are seconds after it was made."""

    def __init__(self, cluster: FaultedCluster) -> None:
        self._cluster = cluster
        self._began = time.monotonic()
        self._before = set(_SHARED_MEMORY.iterdir())
        self.samples: Samples = defaultdict(lambda: defaultdict(list))

    def now(self) -> float:
        return time.monotonic() - self._began

    def take(self) -> None:
        """One more sample of everything that is there now."""
        now = self.now()
        for life, process in self._lives():
            with contextlib.suppress(psutil.Error, OSError):
                for measure, value in _held(process.pid).items():
                    self.samples[measure][life].append((now, value))
        host = Life("host", 0, 0.0)
        made = set(_SHARED_MEMORY.iterdir()) - self._before
        self.samples["shared memory objects"][host].append((now, float(len(made))))

    def _lives(self) -> Iterator[tuple[Life, psutil.Process]]:
        launchers = [("router's launcher", self._cluster.router.pid)]
        launchers += [("launcher", launched.pid) for launched in self._cluster.launchers.values()]
        for name, pid in launchers:
            with contextlib.suppress(psutil.Error, RunError):
                for process in family(pid):
                    role = name if process.pid == pid else _role(process)
                    if role:
                        yield Life(role, process.pid, process.create_time()), process


def _role(process: psutil.Process) -> str:
    """Empty for one that is not ours for long, such as a probe."""
    words = process.cmdline()
    if not words:
        return ""
    found = _ROLES.get(words[0].strip())
    # An instance's own process is a copy of its launcher, which is called by its command.
    return found or ("server" if "benchmark.faults.launch" in words else "")


def _held(pid: int) -> dict[str, float]:
    lines = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    kib = {name: float(lines[name].split()[0]) for name in ("RssAnon", "RssShmem")}
    files = float(sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()))
    values = (kib["RssAnon"] / 1024, kib["RssShmem"] / 1024, files, float(lines["Threads"]))
    return dict(zip(MEASURES, values, strict=True))
