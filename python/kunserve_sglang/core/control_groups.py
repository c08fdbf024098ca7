"""What the kernel's control groups leave to this process: a container's limits, or a unit's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")
_NO_LIMIT = 1 << 60
"""Bytes above which version 1 means that there is none."""


def memory_left(root: Path = _ROOT, own: Path = _OWN) -> Iterator[int]:
    """Bytes that each control group around this process leaves to it, if it has a limit.

    Caches of files count as used there, and are given up when memory is needed.
    """
    for folder, unified in _groups("memory", root, own):
        names = (
            ("memory.max", "memory.current", "inactive_file")
            if unified
            else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        )
        limit = _number(folder / names[0])
        if limit is not None and limit < _NO_LIMIT:
            cached = int(fields_of(folder / "memory.stat", " ").get(names[2], "0"))
            yield max(0, limit - max(0, (_number(folder / names[1]) or 0) - cached))


def cpu_shares(root: Path = _ROOT, own: Path = _OWN) -> Iterator[float]:
    """Cores' worth of time that each control group around this process allows, if it is limited."""
    for folder, unified in _groups("cpu", root, own):
        if unified:
            quota, period = _text(folder / "cpu.max", "max 100000").split()
        else:
            quota = _text(folder / "cpu.cfs_quota_us", "-1")
            period = _text(folder / "cpu.cfs_period_us", "100000")
        if quota.isdecimal():  # neither `max` nor -1
            yield int(quota) / int(period)


def _groups(kind: str, root: Path, own: Path) -> Iterator[tuple[Path, bool]]:
    """The folders of the groups around this process, innermost first; whether of version 2."""
    if not own.is_file():
        return
    for line in own.read_text().splitlines():
        _, kinds, path = line.split(":", 2)
        if kinds and kind not in kinds.split(","):
            continue
        top = root / kind if kinds else root
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            yield folder, not kinds
            if folder == top:
                break


def _number(path: Path) -> int | None:
    """None if there is no such file, or no number in it (`max`)."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _text(path: Path, otherwise: str) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return otherwise


def fields_of(path: Path, between: str = ":") -> dict[str, str]:
    """Names and values of a file of the kernel's, one a line; the first of a name counts."""
    found: dict[str, str] = {}
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        name, _, value = line.partition(between)
        found.setdefault(name.strip(), value.strip())
    return found
