"""How the command line is called: where the router is, by which key, and what is no good usage."""

from __future__ import annotations

import json
import pkgutil
import socket
import tomllib
from collections.abc import Callable

import pytest

from kunserve_sglang.api.client import RouterClient
from kunserve_sglang.api.errors import Unreachable
from kunserve_sglang.cli import main
from tests.support.command_line import Run
from tests.support.mock_worker import Canned, MockWorker
from tests.support.places import ROOT
from tests.support.router_harness import RouterCluster

Start = Callable[..., RouterCluster]


# --- where, and with which key ------------------------------------------------------------------


def test_the_url_may_stand_anywhere(
    idle_router: RouterCluster, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"http://127.0.0.1:{idle_router.port}/"
    assert run(None, "--url", url, "policy").status == 0
    assert run(None, "policy", "--url", url).status == 0
    monkeypatch.setenv("KUNSERVE_URL", url)
    assert run(None, "policy").status == 0
    assert run(None, "--url=127.0.0.1:1", "policy").status == 3


def test_keys(start_router: Start, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    router = start_router(2, admin_api_key="Schlüssel", read_api_key="read")
    done = run(router, "status")
    assert (done.status, "KUNSERVE_READ_API_KEY" in done.error) == (1, True)
    assert run(router, "status", "--read-api-key=read").status == 0
    done = run(router, "drop", "--read-api-key=read")
    assert (done.status, "give --admin-api-key" in done.error) == (1, True)
    assert run(router, "--admin-api-key=Schlüssel", "drop").status == 0
    monkeypatch.setenv("KUNSERVE_READ_API_KEY", "read")
    assert run(router, "status").status == 0
    monkeypatch.setenv("KUNSERVE_ADMIN_API_KEY", "Schlüssel")
    assert run(router, "policy", "set", "drop=0.9").status == 0
    assert run(router, "status", "--admin-api-key=wrong").status == 1


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        "",
        "drain",
        "status now",
        "status --url=ftp://x",
        "status --url=http://x:port",
        "status --url=http://",
        "drop --tokens=0",
        "drop --tokens=many",
        "drop --instances",
        "watch --interval=0",
        "policy set",
        "policy set drop",
        "policy set drop=high",
        "policy set drop=9",
        "policy set treshold=0.9",
        "policy show drop=0.9",
        "policy drop=0.9",
    ],
)
def test_wrong_usage_is_one_line(idle_router: RouterCluster, run: Run, words: str) -> None:
    before = idle_router.get("/kunserve/policy").json
    done = run(idle_router, *words.split())
    assert (done.status, bool(done.error)) == (2, True)
    assert idle_router.get("/kunserve/policy").json == before


def test_nobody_at_the_address_is_one_line(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        client = RouterClient(f"127.0.0.1:{port}", None)
        with pytest.raises(Unreachable, match="did not answer in time"):
            client.call("status", timeout_s=0.05)
    for command in ("status", "watch", "drop", "events --follow"):
        done = run(None, f"--url=http://127.0.0.1:{port}", *command.split())
        assert done.status == 3
        assert done.error.endswith(f"cannot reach http://127.0.0.1:{port}: Connection refused")


def test_some_other_server_is_one_line(worker: MockWorker, run: Run) -> None:
    for canned, status, reason in (
        (Canned("hello"), 3, "no such router"),
        (Canned({"epoch": "x"}), 3, "no such router"),
        (Canned("", 302, {"Location": "/"}), 3, "is this the router's address?"),
        (Canned("no\nsuch page", 404), 1, "404: no such page"),
        (Canned({"detail": "Not Found"}, 404), 1, "404: "),
        (Canned("", 500), 1, "500: no reason given"),
    ):
        worker.answers["/kunserve/status"] = canned
        done = run(None, "--url", worker.url, "status")
        assert (done.status, reason in done.error) == (status, True), done.err
    worker.die_before_headers = True
    assert run(None, "--url", worker.url, "status").status == 3


def test_watch_ends_after_so_many_views(idle_router: RouterCluster, run: Run) -> None:
    done = run(idle_router, "watch", "--count=3", "--interval=0.01", "--json")
    assert [json.loads(line) for line in done.out.splitlines()] == 3 * [idle_router.status()]


def test_the_script_leads_here() -> None:
    project = ROOT / "pyproject.toml"
    script = tomllib.loads(project.read_text())["project"]["scripts"]["kunserve"]
    assert pkgutil.resolve_name(script) is main
