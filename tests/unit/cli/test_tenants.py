"""`kunserve tenants`: who shares the cluster, and what each has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.support.command_line import Run
from tests.support.router_harness import RouterCluster

Start = Callable[..., RouterCluster]


def test_tenants_are_a_line_each(start_router: Start, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "tenants.toml"
    file.write_text("[[tenants]]\nname = 'a'\nkey = 's3cret'\nmax_requests = 9")
    router = start_router(1, tenants=str(file))
    done = run(router, "tenants")
    assert (done.status, done.err) == (0, "")
    names, default, a = done.out.splitlines()
    assert names.split()[:3] == ["tenant", "weight", "running"]
    assert default.split() == ["default", "1", "0", "0", "0", "0", "0", "0"]
    assert a.split() == ["a", "1", "0", "/", "9", "0", "0", "0", "0", "0"]
    file.write_text("[default]\nweight = 2.5")
    assert len(run(router, "tenants").out.splitlines()) == 3
    assert run(router, "tenants", "--reload").out.splitlines()[1].split()[:2] == ["default", "2.5"]
    file.write_text("[")
    assert "409 tenants_unreadable" in run(router, "tenants", "--reload").error


def test_without_tenants_it_says_so(start_router: Start, run: Run) -> None:
    router = start_router(1)
    assert run(router, "tenants").out.startswith("no tenants")
