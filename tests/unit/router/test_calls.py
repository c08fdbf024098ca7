"""Every call of the admin API: success, bad input, a missing key, and a transition that runs.

The tests are made from the router's own table of calls, so a new call fails here until `CASES` says
how to make it; and where a case cannot exist for a call, `CASES` says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest

from kunserve_sglang.api.calls import CALLS, Access, Call
from tests.support.mock_instance import MODEL
from tests.support.router_harness import Answer, RouterCluster
from tests.support.waiting import until
from tests.unit.router.test_docs import ADMIN, Checker

Start = Callable[..., RouterCluster]

READ = {"Authorization": "Bearer read"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A call that succeeds on two instances, as one group if it has to be `grouped`.

    `no_conflict` says why it succeeds during a transition as well, `no_bad_input` why nothing can
    be wrong with it. With `impatient` as its query it does not wait for a transition to end.
    """

    path: str = ""
    body: Any = None
    grouped: bool = False
    no_conflict: str = ""
    no_bad_input: str = ""
    impatient: str = ""


ONLY_LOOKS = "it only looks"
TAKES_NOTHING = "it takes no body and no parameters"

CASES = {
    "status": Case(no_conflict=ONLY_LOOKS, no_bad_input=TAKES_NOTHING),
    "plan": Case(body={}, no_conflict="a dry run of what would be done next"),
    "drop": Case(body={}),
    "restore": Case(body={}, grouped=True),
    "policy": Case(no_conflict=ONLY_LOOKS, no_bad_input=TAKES_NOTHING),
    "set_policy": Case(body={"cooldown_s": 0}, no_conflict="it is about the next transition"),
    "events": Case(no_conflict=ONLY_LOOKS),
    "history": Case(no_conflict=ONLY_LOOKS, no_bad_input=TAKES_NOTHING),
    "trace": Case(
        # The other instance is the one that keeps the transition from ending, and answers nothing.
        body={"seconds": 0.01, "instances": [1]},
        no_conflict="transitions are what one wants to record",
    ),
    "tenants": Case(no_conflict=ONLY_LOOKS, no_bad_input=TAKES_NOTHING),
    "reload_tenants": Case(no_conflict="tenants are about requests", no_bad_input=TAKES_NOTHING),
    "openapi": Case(no_conflict=ONLY_LOOKS, no_bad_input=TAKES_NOTHING),
    "workers": Case(no_conflict=ONLY_LOOKS, no_bad_input=TAKES_NOTHING),
    "add_worker": Case(
        body={"url": "http://127.0.0.1:9"}, no_conflict="plain servers take no part in transitions"
    ),
    "join": Case(
        body={"model": msgspec.to_builtins(MODEL)},
        no_conflict="an instance that joins takes part in the next",
    ),
    "drain": Case(path="/workers/1", grouped=True, impatient="?timeout_s=0.1"),
}

every_call = pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)


def case_of(call: Call) -> Case:
    assert call.name in CASES, f"CASES must say how to make the call {call.name!r}"
    return CASES[call.name]


def path_of(call: Call) -> str:
    return case_of(call).path or call.path


def start(start_router: Start, call: Call) -> RouterCluster:
    """Two instances as the call needs them."""
    router = start_router(2, admin_api_key="admin", read_api_key="read")
    if case_of(call).grouped:
        assert router.post("/kunserve/drop", {}, **ADMIN).json["status"] == "committed"
        until(lambda: all(d["mode"] == "cooperative" for d in router.status()["instances"]))
    return router


def make(router: RouterCluster, call: Call, query: str = "") -> Answer:
    """The call as it should succeed, its answer held against its description."""
    return Checker(router).call(call.method, path_of(call) + query, case_of(call).body)


def assert_refused(answer: Answer, status: int, code: str, field: str | None = None) -> None:
    assert (answer.status, answer.error["code"]) == (status, code)
    assert answer.error.get("field") == field


@pytest.fixture(scope="module")
def guarded() -> Iterator[RouterCluster]:
    """A router for calls that are refused, so that it stays as it is."""
    router = RouterCluster(2, admin_api_key="admin", read_api_key="read")
    yield router
    assert router.event() is None
    assert not any(d.get("draining") for d in router.status()["instances"])
    router.close()


def test_every_case_is_one_of_a_call() -> None:
    assert CASES.keys() == {call.name for call in CALLS}


@every_call
def test_success(start_router: Start, call: Call) -> None:
    assert make(start(start_router, call), call).status == min(call.answers)


@every_call
def test_bad_input(guarded: RouterCluster, call: Call) -> None:
    checker, path = Checker(guarded), path_of(call)
    assert bool(case_of(call).no_bad_input) == (call.body is None and not call.parameters)
    if call.body is not None:
        assert_refused(checker.call(call.method, path, b"{"), 400, "bad_json")
        wrong = checker.call(call.method, path, {"x": 1})
        assert_refused(wrong, 422, "invalid_field", "x")
    for parameter in call.parameters:
        if parameter.in_path:
            wrong_path = call.path.replace(f"{{{parameter.name}}}", "nonsense")
        else:
            wrong_path = f"{path}?{parameter.name}=nonsense"
        wrong = checker.call(call.method, wrong_path)
        assert_refused(wrong, 422, "invalid_field", parameter.name)


@every_call
def test_a_missing_key(guarded: RouterCluster, call: Call) -> None:
    checker, path = Checker(guarded), path_of(call)
    changes = call.access is Access.CHANGE
    code = "admin_key_required" if changes else "read_key_required"
    for header in ("", "Bearer", "Bearer adm", "admin", *([READ["Authorization"]] * changes)):
        answer = checker.call(call.method, path, {}, Authorization=header)
        assert_refused(answer, 401, code)
        assert answer.headers["www-authenticate"] == "Bearer"


@every_call
def test_while_a_transition_runs(start_router: Start, call: Call) -> None:
    router, case = start(start_router, call), case_of(call)
    with router.instances[0].holding_votes():
        kind = "restore" if case.grouped else "drop"
        assert router.post(f"/kunserve/{kind}?wait=false", {}, **ADMIN).status == 202
        answer = make(router, call, case.impatient)
        assert router.status()["transition"]["kind"] == kind
    if case.no_conflict:
        assert answer.status == min(call.answers)
    else:
        assert_refused(answer, 409, "transition_running")
    until(lambda: (router.event() or {}).get("kind") == kind)
    assert router.event()["status"] == "committed"
