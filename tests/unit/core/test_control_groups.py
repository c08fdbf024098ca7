"""Limits of containers and units, read in files like the kernel's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kunserve_sglang.core import processes
from kunserve_sglang.core.control_groups import cpu_shares, memory_left
from kunserve_sglang.core.processes import divide_cpus, granted_cpus

V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")


def group(folder: Path, names: tuple[str, str, str], limit: str, used: int, cached: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 7\n{names[2]} {cached}\n")


@pytest.mark.parametrize(
    ("line", "top", "names", "none"),
    [("0::", "", V2, "max"), ("4:hugetlb,memory:", "memory", V1, str((1 << 63) - 4096))],
    ids=["v2", "v1"],
)
def test_all_groups_around_a_process_leave_it_memory(
    tmp_path: Path, line: str, top: str, names: tuple[str, str, str], none: str
) -> None:
    own, root = tmp_path / "own", tmp_path / "groups" / top
    own.write_text(f"9:pids:/elsewhere\n{line}/outer/inner\n")
    group(root / "outer" / "inner", names, "1000", 300, 100)
    group(root / "outer", names, "2000", 1900, 0)
    group(root, names, none, 5000, 0)
    assert list(memory_left(tmp_path / "groups", own)) == [800, 100]
    group(root / "outer", names, "2000", 2100, 0)
    assert min(memory_left(tmp_path / "groups", own)) == 0


def test_without_groups_there_is_no_limit(tmp_path: Path) -> None:
    own = tmp_path / "own"
    assert not [*memory_left(tmp_path, own), *cpu_shares(tmp_path, own)]
    own.write_text("1:name=systemd:/\n0::/gone\n")
    assert not [*memory_left(tmp_path, own), *cpu_shares(tmp_path, own)]


def test_cores_are_limited_by_groups_of_the_second_version(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("0::/outer/inner\n")
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    (tmp_path / "outer" / "inner" / "cpu.max").write_text("max 100000\n")
    (tmp_path / "outer" / "cpu.max").write_text("350000 100000\n")
    assert list(cpu_shares(tmp_path, own)) == [3.5]


def test_cores_are_limited_by_groups_of_the_first_version(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("4:memory:/other\n3:cpu,cpuacct:/inner\n")
    for folder, quota in ((tmp_path / "cpu", -1), (tmp_path / "cpu" / "inner", 20_000)):
        folder.mkdir()
        (folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (folder / "cpu.cfs_period_us").write_text("10000\n")
    assert list(cpu_shares(tmp_path, own)) == [2.0]


@pytest.mark.parametrize(("shares", "granted"), [([], 8), ([64.0], 8), ([3.5, 6.0], 3), ([0.2], 1)])
def test_instances_get_as_many_cores_as_they_have_time_for(
    monkeypatch: pytest.MonkeyPatch, shares: list[float], granted: int
) -> None:
    cores = set(range(16, 24))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores)
    monkeypatch.setattr(processes, "cpu_shares", lambda: iter(shares))
    found = granted_cpus()
    assert len(set(found)) == granted
    assert set(found) <= cores
    assert divide_cpus(granted, found) == [(cpu,) for cpu in found]
