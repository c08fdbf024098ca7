"""What the doctor reads in the kernel's files."""

from __future__ import annotations

from pathlib import Path

import pytest

from kunserve_sglang.cli.doctor.hosts import left_by_groups, shown_gpus, this_host

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
def test_all_groups_around_a_process_leave_it_something(
    tmp_path: Path, line: str, top: str, names: tuple[str, str, str], none: str
) -> None:
    own, root = tmp_path / "own", tmp_path / "groups" / top
    own.write_text(f"9:pids:/elsewhere\n{line}/outer/inner\n")
    group(root / "outer" / "inner", names, "1000", 300, 100)
    group(root / "outer", names, "2000", 1900, 0)
    group(root, names, none, 5000, 0)
    assert list(left_by_groups(tmp_path / "groups", own)) == [800, 100]
    group(root / "outer", names, "2000", 2100, 0)
    assert min(left_by_groups(tmp_path / "groups", own)) == 0


def test_without_groups_there_is_no_limit(tmp_path: Path) -> None:
    own = tmp_path / "own"
    assert list(left_by_groups(tmp_path, own)) == []
    own.write_text("1:name=systemd:/\n0::/gone\n")
    assert list(left_by_groups(tmp_path, own)) == []


@pytest.mark.parametrize(
    ("visible", "shown"),
    [
        (None, ("A", "B")),
        ("", ()),
        ("-1", ()),
        ("1", ("B",)),
        ("1, 0", ("B", "A")),
        ("0,7,1", ("A",)),
        ("GPU-1234", ("GPU",)),
    ],
)
def test_gpus_are_those_that_programs_see(visible: str | None, shown: tuple[str, ...]) -> None:
    assert shown_gpus(("A", "B"), visible) == shown


def test_this_host_has_what_every_host_has() -> None:
    host = this_host()
    assert host.cores > 0
    assert host.memory.available > 0
    assert host.mappings > 0
    assert host.temporary.error == ""
