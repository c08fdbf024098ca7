"""Keys for looking and for changing, and the record of who has changed what."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from kunserve_sglang.api.calls import CALLS, Access
from kunserve_sglang.api.types import ClusterStatus
from kunserve_sglang.core.cluster_config import ClusterConfig
from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.core.flags import read_flags
from kunserve_sglang.launch.options import LaunchOptions
from kunserve_sglang.launch.server import Supervisor
from kunserve_sglang.launch_server import kunserve_parser
from kunserve_sglang.router.admin.access import Keys
from kunserve_sglang.router.settings import RouterConfig
from tests.support.mock_worker import Canned
from tests.support.router_harness import Answer, RouterCluster
from tests.support.waiting import until
from tests.unit.router.test_calls import path_of

Start = Callable[..., RouterCluster]
Audit = Callable[[], list[Any]]

ADMIN = {"Authorization": "Bearer s3cret-admin"}
READ = {"Authorization": "Bearer s3cret-read"}
LOOKS = [(c.method, path_of(c)) for c in CALLS if c.access is Access.READ]
CHANGES = [(c.method, path_of(c)) for c in CALLS if c.access is Access.CHANGE]
CHANGES.append(("POST", "/flush_cache"))


@pytest.fixture
def audit(caplog: pytest.LogCaptureFixture) -> Audit:
    """The audit lines so far; each is written just after its answer."""
    caplog.set_level(logging.INFO, "kunserve.audit")

    def lines() -> list[Any]:
        records = [r for r in caplog.records if r.name == "kunserve.audit"]
        assert not any("\n" in r.getMessage() for r in records)
        return [json.loads(r.getMessage()) for r in records]

    return lines


def with_keys(start_router: Start) -> RouterCluster:
    return start_router(2, admin_api_key="s3cret-admin", read_api_key="s3cret-read")


def assert_refused(answer: Answer, code: str) -> None:
    assert (answer.status, answer.error["code"]) == (401, code)
    assert answer.headers["www-authenticate"] == "Bearer"


def test_both_keys_open_what_only_looks(start_router: Start) -> None:
    router = with_keys(start_router)
    for method, path in LOOKS:
        for right in (READ, ADMIN):
            assert router.call(method, path, {}, right).status == 200


def test_the_read_key_changes_nothing(start_router: Start) -> None:
    router = with_keys(start_router)
    for method, path in CHANGES:
        assert_refused(router.call(method, path, {}, READ), "admin_key_required")
    assert router.event() is None
    assert not any(i.worker.requests("/flush_cache") for i in router.instances)
    assert router.post("/kunserve/drop", {}, **ADMIN).json["status"] == "committed"


def test_probes_and_the_docs_page_need_no_key(start_router: Start) -> None:
    router = with_keys(start_router)
    for path in ("/health", "/liveness", "/readiness", "/metrics", "/docs"):
        assert router.get(path).status == 200


def test_server_info_tells_of_the_cluster_only_those_who_may_look(start_router: Start) -> None:
    router = with_keys(start_router)
    router.instances[0].worker.answers["/server_info"] = Canned({"tp_size": 1})
    assert router.get("/server_info").json == {"tp_size": 1}
    assert set(router.get("/server_info", **READ).json) == {"tp_size", "kunserve"}


def test_the_launcher_may_look(start_router: Start) -> None:
    router = with_keys(start_router)
    words = ("--admin-api-key=s3cret-admin", "--read-api-key=s3cret-read")
    flags = kunserve_parser().parse_args([*words, f"--port={router.port}"])
    launcher = Supervisor(read_flags(flags, ClusterConfig), LaunchOptions(), [])
    launcher._folder = router.folder
    launcher.find_router()
    assert launcher._status() == msgspec.convert(router.status(), ClusterStatus)


def router_config(api_key: str | None = None, **keys: str) -> RouterConfig:
    return RouterConfig(cluster=ClusterConfig(**keys), control_address="c", api_key=api_key)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "2001:db8::1", "example.org", ""])
def test_nobody_listens_to_others_without_a_key_by_mistake(host: str) -> None:
    def config(api_key: str | None = None, **settings: Any) -> RouterConfig:
        cluster = ClusterConfig(host=host, **settings)
        return RouterConfig(cluster=cluster, control_address="c", api_key=api_key)

    with pytest.raises(ConfigurationError, match=f"--host {host} .*--allow-open"):
        config()
    for fine in ({"api_key": "k"}, {"admin_api_key": "a"}, {"allow_open": True}):
        config(**fine)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_this_host_needs_no_key(host: str) -> None:
    RouterConfig(cluster=ClusterConfig(host=host), control_address="c")


def test_keys_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="--read-api-key needs --admin-api-key"):
        router_config(read_api_key="r")
    with pytest.raises(ConfigurationError, match="must differ"):
        router_config(read_api_key="a", admin_api_key="a")
    with pytest.raises(ConfigurationError, match="must differ"):
        router_config(read_api_key="a", api_key="a")
    assert router_config(read_api_key="r", api_key="a").admin_key == "a"


def test_a_key_within_a_key_leaves_nothing_of_either() -> None:
    keys = Keys(router_config(admin_api_key="open sesame", read_api_key="open"))
    told = {"a": ["open sesame", 1, None], "open": {"b": "to open it"}}
    assert keys.redact(told) == {"a": ["[key]", 1, None], "[key]": {"b": "to [key] it"}}


def test_every_change_is_written_down(start_router: Start, audit: Audit) -> None:
    router = with_keys(start_router)
    router.post("/kunserve/drop?wait=true", {"instances": [0, 1]}, **ADMIN)
    router.put("/kunserve/policy", {"drop": 0.9}, **ADMIN)
    router.post("/flush_cache", **ADMIN)
    until(lambda: len(audit()) == 3)
    drop, policy, flush = audit()
    assert drop.pop("time")[:2] == "20"
    assert drop.pop("who") == {"key": "admin", "address": "127.0.0.1"}
    assert drop == {
        "call": "POST /kunserve/drop?wait=true",
        "body": {"instances": [0, 1]},
        "outcome": {"status": 200, "result": "committed", "epoch": router.event()["epoch"]},
    }
    assert (policy["call"], policy["body"]) == ("PUT /kunserve/policy", {"drop": 0.9})
    assert policy["outcome"] == flush["outcome"] == {"status": 200, "result": "ok"}
    assert (flush["call"], flush["body"]) == ("POST /flush_cache", None)


def test_looking_is_not_written_down(start_router: Start, audit: Audit) -> None:
    router = with_keys(start_router)
    for method, path in LOOKS:
        router.call(method, path, {}, READ)
    router.post("/kunserve/drop")
    until(audit)
    assert [line["call"] for line in audit()] == ["POST /kunserve/drop"]


@pytest.mark.parametrize(
    ("headers", "key"),
    [({}, "none"), (READ, "read"), ({"Authorization": "Bearer s3cret-admi"}, "unknown")],
)
def test_refused_callers_are_written_down(
    start_router: Start, audit: Audit, headers: dict[str, str], key: str
) -> None:
    router = with_keys(start_router)
    for method, path in CHANGES:
        router.call(method, path, {"drop": 0.9}, headers)
    until(lambda: len(audit()) == len(CHANGES))
    assert [line["call"] for line in audit()] == [f"{m} {p}" for m, p in CHANGES]
    for line in audit():
        assert line["who"] == {"key": key, "address": "127.0.0.1"}
        assert line["body"] is None
        assert (line["outcome"]["status"], line["outcome"]["result"]) == (401, "admin_key_required")
        assert "s3cret" not in json.dumps(line)


def test_refused_changes_are_written_down(impatient: RouterCluster, audit: Audit) -> None:
    router = impatient
    router.call("POST", "/kunserve/drop", b"{")
    router.post("/kunserve/restore", {})
    router.put("/kunserve/policy", {"drop": "0.9"})
    router.instances[1].on_prepare = lambda _: None
    router.post("/kunserve/drop")
    until(lambda: len(audit()) == 4)
    assert [(a["outcome"]["status"], a["outcome"]["result"]) for a in audit()] == [
        (400, "bad_json"),
        (409, "no_plan"),
        (422, "invalid_field"),
        (200, "aborted"),
    ]
    assert [a["body"] for a in audit()] == ["{", {}, {"drop": "0.9"}, None]
    assert all(a["who"]["key"] == "none" for a in audit())
    assert "did not answer PREPARE" in audit()[3]["outcome"]["message"]


def test_what_has_only_begun_is_written_down(router: RouterCluster, audit: Audit) -> None:
    router.post("/kunserve/drop?wait=false")
    until(audit)
    assert audit()[0]["outcome"] == {"status": 202, "result": "accepted"}


def test_bodies_that_are_too_much_are_not_kept(router: RouterCluster, audit: Audit) -> None:
    router.call("POST", "/kunserve/drop", b'{"x": "' + 20_000 * b"y" + b'"}')
    router.call("POST", "/kunserve/drop", 700 * b"[" + 700 * b"]")
    until(lambda: len(audit()) == 2)
    assert audit()[0]["body"] == "[20009 bytes]"
    assert [a["outcome"]["result"] for a in audit()] == ["invalid_field", "bad_json"]


def test_keys_are_never_written_down(start_router: Start, audit: Audit) -> None:
    router = start_router(1, api_key="s3cret-api", admin_api_key="s3cret-ädmin")
    key = {"Authorization": "Bearer s3cret-ädmin".encode()}
    path = "/flush_cache?key=s3cret-%C3%A4dmin&api=s3cret-api"
    router.call("POST", path, {"s3cret-api": ["x s3cret-ädmin x"]}, key)
    router.call("POST", "/kunserve/drop", {"s3cret-api": 1}, key)
    until(lambda: len(audit()) == 2)
    flush, drop = audit()
    assert flush["call"] == "POST /flush_cache?key=[key]&api=[key]"
    assert flush["body"] == {"[key]": ["x [key] x"]}
    assert "[key]" in drop["outcome"]["message"]
    assert "s3cret" not in json.dumps(audit())


def test_a_key_that_is_a_common_word_leaves_our_own_words_alone(
    start_router: Start, audit: Audit
) -> None:
    router = start_router(1, admin_api_key="admin")
    router.put("/kunserve/policy", {"admin": 1})
    router.put("/kunserve/policy", {"admin": 1}, Authorization="Bearer admin")
    until(lambda: len(audit()) == 2)
    refused, wrong = audit()
    assert refused["outcome"]["result"] == "admin_key_required"
    assert (wrong["who"]["key"], wrong["body"]) == ("admin", {"[key]": 1})
    assert wrong["outcome"]["message"].startswith("[key]: ")


def test_a_bug_is_written_down(
    router: RouterCluster, audit: Audit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("kunserve_sglang.policy.controller.plan_drop", broken)
    assert router.post("/kunserve/drop").status == 500
    until(audit)
    assert audit()[0]["outcome"] == {"status": 500, "result": "internal_error"}
