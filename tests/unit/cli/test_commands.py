"""The command line against a router with mock instances: what it shows, and how it ends."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from kunserve_sglang.core.fault_points import POINTS
from kunserve_sglang.testing.mock_member import CAPACITY
from tests.support.command_line import Run
from tests.support.mock_instance import vote_no
from tests.support.mock_worker import Canned, MockWorker
from tests.support.router_harness import RouterCluster
from tests.support.waiting import until

Start = Callable[..., RouterCluster]


def cooperate(router: RouterCluster) -> None:
    assert router.post("/kunserve/drop").json["status"] == "committed"
    until(lambda: {i["mode"] for i in router.status()["instances"]} == {"cooperative"})


# --- looking ------------------------------------------------------------------------------------


def test_status_shows_every_instance(router: RouterCluster, run: Run) -> None:
    router.instances[1].set_load(demand=321, running=2)
    until(lambda: router.described(1)["demand"] == 321)
    done = run(router, "status")
    assert (done.status, done.err) == (0, "")
    headline, names, first, second, legend = done.out.splitlines()
    assert "by hand only" in headline
    assert "drop above 95%, restore below 50%" in headline
    assert names.split()[:5] == ["id", "mode", "group", "layers", "memory"]
    assert first.split()[:2] == ["0", "independent"]
    assert "[0, 4)" in first
    assert f"0 / {CAPACITY:,}" in first
    assert second.split()[-4:] == ["2", "0", "321", f"({321 / CAPACITY:.0%})"]
    assert "parameters" in legend
    # Half of the pages are parameters, the other half is KV that nobody uses.
    assert "█" * 12 + "░" * 12 in first

    cooperate(router)
    assert "0, 1   [2, 4)" in run(router, "status").out
    assert "█" * 6 + "░" * 18 in run(router, "status").out


def test_a_drain_says_who_has_left(router: RouterCluster, run: Run) -> None:
    done = run(router, "drain", "1")
    assert (done.status, done.err) == (0, "")
    assert done.out == f"instance 1 at {router.instances[1].worker.url} has left\n"
    assert "404 unknown_worker" in run(router, "drain", "1").error
    assert run(router, "drain").status == 2


def test_a_drain_need_not_be_waited_for(router: RouterCluster, run: Run) -> None:
    connection = router.open("POST", "/generate", {"stream": True})
    until(lambda: any(i.worker.streams for i in router.instances))
    busy = next(i for i in router.instances if i.worker.streams)
    number = str(busy.number)
    assert "504 drain_timeout" in run(router, "drain", number, "--timeout-s", "0.1").error
    assert "leaves, 1 requests under way" in run(router, "drain", number, "--no-wait").out
    assert "(draining)" in run(router, "status").out
    busy.worker.finish()
    connection.close()


def test_status_shows_how_fast_answers_are(start_router: Start, run: Run) -> None:
    router = start_router(1)
    assert "TTFT" not in run(router, "status").out
    connection = router.open("POST", "/generate", {"stream": True})
    worker = router.instances[0].worker
    until(lambda: worker.streams)
    worker.emit(b"data: 1\n\n")
    until(lambda: router.status()["latency"]["samples"])
    worker.finish()
    assert re.search(r"TTFT p50 [\d,]+ ms, p99 [\d,]+ ms", run(router, "status").out)
    connection.close()


def test_status_shows_who_gets_what_was_promised(start_router: Start, run: Run) -> None:
    router = start_router(1, slo_ttft_ms=3_600_000, slo_tpot_ms=3_600_000, slo_class=("fast=5:5",))
    assert "limits kept" not in run(router, "status").out
    worker = router.instances[0].worker
    worker.answers["/generate"] = Canned({"meta_info": {"completion_tokens": 3}})
    assert router.post("/generate", {}).status == 200
    worker.answers["/generate"] = Canned("", 503)
    assert [router.post("/generate", {}).status for _ in range(2)] == [503, 503]
    assert router.post("/generate", {}, **{"X-KunServe-Class": "fast"}).status == 503
    until(lambda: sum(c["requests"] for c in router.status()["attainment"]["classes"]) == 4)
    shown = run(router, "status").out.splitlines()[1]
    assert shown == "limits kept in the last 60 s: default 33% of 3 requests, fast 0% of 1"


def test_status_shows_what_is_queued(start_router: Start, run: Run) -> None:
    router = start_router(1, max_in_flight=1)
    assert "queued" not in run(router, "status").out
    connections = [router.open("POST", "/generate", {"stream": True}) for _ in range(3)]
    until(lambda: router.status()["queue"]["requests"] == 2)
    assert re.search(r"2 queued, the oldest for [\d.]+ s", run(router, "status").out)
    for connection in connections:
        connection.close()
    until(lambda: router.status()["queue"] == {"requests": 0, "oldest_s": 0})
    assert "queued" not in run(router, "status").out


def test_an_instance_without_a_report_is_shown(start_router: Start, run: Run) -> None:
    router = start_router(0, expect=1)
    router.instances.append(router.add(0, reporting=False))
    until(lambda: router.status()["instances"])
    assert "0   dead" in run(router, "status").out


def test_a_plain_server_is_shown_as_one(start_router: Start, run: Run, worker: MockWorker) -> None:
    router = start_router(1)
    number = router.post("/workers", {"url": worker.url}).json["id"]
    until(lambda: router.described(number)["serving"])
    done = run(router, "status")
    (line,) = [line for line in done.out.splitlines() if line.split()[:1] == [str(number)]]
    assert line.split() == [str(number), "independent", "(plain", "SGLang)", *["-"] * 7]


def test_json_is_the_answer_as_it_came(idle_router: RouterCluster, run: Run) -> None:
    assert run(idle_router, "status", "--json").json == idle_router.status()
    assert run(idle_router, "--json", "policy").json == idle_router.get("/kunserve/policy").json
    assert run(idle_router, "plan", "--json").json == idle_router.post("/kunserve/plan").json
    assert run(idle_router, "events", "--json").json == {"events": []}


def test_a_plan_is_shown_and_changes_nothing(idle_router: RouterCluster, run: Run) -> None:
    plan = idle_router.post("/kunserve/plan").json
    for words in ((), ("--instances", "0", "1"), ("--tokens", "5")):
        out = run(idle_router, "plan", *words).out
        assert out.startswith("drop of instances 0, 1 (")
        assert f"{plan['capacity_before']:,} -> {plan['capacity_after']:,} slots" in out
        assert "[0, 2), [2, 4)" in out
        verdict = "as asked for" if "--instances" in words else "the shortest pipelines"
        assert f"slots): {verdict}" in out
    assert idle_router.event() is None


def test_what_cannot_be_planned_is_refused(idle_router: RouterCluster, run: Run) -> None:
    done = run(idle_router, "plan", "--restore")
    assert done.status == 1
    assert "409 no_plan" in done.error
    done = run(idle_router, "drop", "--instances", "0", "7")
    assert done.status == 1
    assert "[7] are not known" in done.error


def test_events_are_listed(router: RouterCluster, run: Run) -> None:
    router.post("/kunserve/drop")
    router.post("/kunserve/restore")
    _, drop, restore = run(router, "events").out.splitlines()
    assert "drop" in drop
    assert "committed" in drop
    assert "restore" in restore
    (last,) = run(router, "events", "--limit=1", "--json").json["events"]
    assert last["kind"] == "restore"


def test_a_narrow_terminal_shows_all_there_is(
    router: RouterCluster, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    cooperate(router)
    monkeypatch.setenv("COLUMNS", "80")
    for command, words in (
        ("status", ("cooperative", "[2, 4)", "█", "0 (0%)")),
        ("events", ("committed", "drop of instances 0, 1", "asked for")),
    ):
        out = " ".join(run(router, command).out.split())
        assert "…" not in out
        for word in words:
            assert word in out


def test_a_lost_instance_is_shown_with_the_reason(router: RouterCluster, run: Run) -> None:
    router.instances[1].worker.stop()
    until(lambda: router.post("/v1/completions", {}) and router.described(1).get("lost"))
    assert "instance 1: connection refused" in run(router, "status").out
    router.instances[1].worker.start()


def test_a_trace_becomes_a_file(router: RouterCluster, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    done = run(router, "trace", "--seconds=0.01", f"--output={path}")
    assert (done.status, str(path) in done.out) == (0, True)
    names = {e["name"] for e in json.loads(path.read_bytes())["traceEvents"]}
    assert names == {"process_name", "step"}
    done = run(router, "trace", "--seconds=0.01", "--instances=1", "--json")
    assert {e["pid"] for e in done.json["traceEvents"]} == {1}
    done = run(router, "trace", "--seconds=0.01", f"--output={tmp_path}")
    assert (done.status, "Is a directory" in done.error) == (2, True)


# --- changing -----------------------------------------------------------------------------------


def test_drop_and_restore(router: RouterCluster, run: Run) -> None:
    done = run(router, "drop")
    assert (done.status, done.err) == (0, "")
    (line,) = done.out.splitlines()
    assert "committed  drop of instances 0, 1" in line
    until(lambda: {i["mode"] for i in router.status()["instances"]} == {"cooperative"})
    event = run(router, "restore", "--instances", "0", "--json").json
    assert (event["kind"], event["status"]) == ("restore", "committed")


def test_what_has_only_begun_is_shown_as_a_plan(router: RouterCluster, run: Run) -> None:
    assert run(router, "drop", "--no-wait", "--json").json["accepted"] is True
    until(router.event)
    until(lambda: {i["mode"] for i in router.status()["instances"]} == {"cooperative"})
    assert run(router, "restore", "--no-wait").out.startswith("restore of instances 0, 1")
    until(lambda: router.event()["kind"] == "restore")


def test_a_transition_that_was_aborted_is_no_success(router: RouterCluster, run: Run) -> None:
    router.instances[1].on_prepare = vote_no
    done = run(router, "drop")
    assert done.status == 1
    assert "aborted" in done.out
    (line,) = done.err.splitlines()
    assert "was not carried out (aborted): instance 1 refused: not now" in line
    done = run(router, "drop", "--json")
    assert (done.status, json.loads(done.out)["status"]) == (1, "aborted")


def test_the_policy_is_shown_and_set(router: RouterCluster, run: Run) -> None:
    before = router.get("/kunserve/policy").json
    assert {tuple(line.split()) for line in run(router, "policy").out.splitlines()[1:]} == {
        ("drop", "0.95"),
        ("restore", "0.5"),
        ("drop_hold_s", "0.2"),
        ("restore_hold_s", "3"),
        ("cooldown_s", "5"),
        ("lead_s", "1"),
        ("auto", "false"),
    }
    assert run(router, "policy", "show", "--json").json == before
    done = run(router, "policy", "set", "auto=on", "drop=0.8", "--json")
    assert done.json == {**before, "auto": True, "drop": 0.8}
    assert run(router, "policy", "set", "auto=false").status == 0
    assert router.get("/kunserve/policy").json == {**before, "drop": 0.8}
    done = run(router, "policy", "set", "restore=0.9")
    assert (done.status, "422 invalid_field: restore" in done.error) == (1, True)


def test_faults_on_purpose_are_listed(run: Run) -> None:
    done = run(None, "faults")
    lines = done.out.splitlines()
    assert done.status == 0
    assert len(lines) == 1 + len(POINTS)
    (line,) = [line for line in lines if line.startswith("exchange.received ")]
    assert "crash, hang, delay, drop, corrupt" in line
    assert all(point.about in done.out for point in POINTS.values() if len(point.about) < 60)
    assert run(None, "faults", "--json").json["transition.joined"]["kinds"] == [
        *("crash", "hang", "delay")
    ]
