"""Attainment as operators see it, of requests that go through a router."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kunserve_sglang.core.cost_model import CostModel
from kunserve_sglang.testing.mock_member import CAPACITY, LAYERS
from tests.support.mock_worker import Canned, MockWorker
from tests.support.recorded_streams import begun, event, with_record
from tests.support.router_harness import RouterCluster
from tests.support.waiting import until
from tests.unit.router.test_metrics import scrape, value

Start = Callable[..., RouterCluster]

TTFT, TPOT, CLASS = "X-KunServe-SLO-TTFT-MS", "X-KunServe-SLO-TPOT-MS", "X-KunServe-Class"
HOUR_MS = 3_600_000
TOO_SHORT = "0.0001"
"""No answer comes within it, and each within an hour: nothing depends on how fast a machine is."""


@pytest.fixture
def patient(start_router: Start) -> RouterCluster:
    """A router whose requests may take an hour, those of the class `hasty` no time at all."""
    return start_router(
        1,
        slo_ttft_ms=HOUR_MS,
        slo_tpot_ms=HOUR_MS,
        slo_class=(f"hasty={TOO_SHORT}:{TOO_SHORT}",),
    )


def seen(router: RouterCluster, name: str = "default") -> Any:
    """What the status says of a class."""
    return next(c for c in router.status()["attainment"]["classes"] if c["name"] == name)


def counted(router: RouterCluster, name: str = "default") -> tuple[int, int]:
    """Requests that have kept their limits, and that have not."""
    found = seen(router, name)
    kept: int = found["kept"]
    return kept, found["requests"] - kept


def stream(router: RouterCluster, **headers: str) -> None:
    """One answer of two chunks, got to its end."""
    worker = router.instances[0].worker
    connection = router.open("POST", "/generate", {"stream": True}, headers)
    until(lambda: worker.streams)
    worker.emit(b"data: 1\n\n")
    response = connection.getresponse()
    response.read1(100)  # what comes at once is one chunk
    worker.emit(b"data: 2\n\n")
    worker.finish()
    response.read()
    connection.close()
    until(lambda: not worker.streams)


def test_streams_are_held_against_the_limits_of_the_cluster(patient: RouterCluster) -> None:
    assert seen(patient) == {
        "name": "default",
        "ttft_ms": HOUR_MS,
        "tpot_ms": HOUR_MS,
        "requests": 0,
        "kept": 0,
        "attainment": None,
    }
    stream(patient)
    until(lambda: counted(patient) == (1, 0))
    stream(patient, **{TTFT: TOO_SHORT})
    stream(patient, **{TPOT: TOO_SHORT})
    until(lambda: counted(patient) == (1, 2))
    assert seen(patient)["attainment"] == pytest.approx(1 / 3)
    assert counted(patient, "hasty") == (0, 0)


def test_a_late_first_token_is_seen_before_the_answer_has_ended(patient: RouterCluster) -> None:
    worker = patient.instances[0].worker
    connection = patient.open("POST", "/generate", {"stream": True}, {CLASS: "hasty"})
    until(lambda: worker.streams)
    worker.emit(b"data: 1\n\n")
    until(lambda: counted(patient, "hasty") == (0, 1))
    worker.finish()
    connection.close()


def test_classes_have_limits_and_metrics_of_their_own(patient: RouterCluster) -> None:
    stream(patient, **{CLASS: "hasty"})
    stream(patient, **{CLASS: "hasty", TTFT: str(HOUR_MS), TPOT: str(HOUR_MS)})
    stream(patient, **{CLASS: "default"})
    until(lambda: counted(patient, "hasty") == (1, 1) and counted(patient) == (1, 0))
    samples = scrape(patient)
    requests = "kunserve:slo_requests_total"
    assert value(samples, requests, **{"class": "default", "kept": "true"}) == 1
    assert value(samples, requests, **{"class": "default", "kept": "false"}) == 0
    assert value(samples, requests, **{"class": "hasty", "kept": "true"}) == 1
    assert value(samples, requests, **{"class": "hasty", "kept": "false"}) == 1
    assert value(samples, "kunserve:slo_ttft_seconds", **{"class": "default"}) == HOUR_MS / 1e3
    assert value(samples, "kunserve:slo_tpot_seconds", **{"class": "hasty"}) == pytest.approx(1e-7)


def test_whole_answers_are_judged_if_they_say_how_long_they_are(patient: RouterCluster) -> None:
    answers, path = patient.instances[0].worker.answers, "/v1/chat/completions"
    answers[path] = Canned({"usage": {"completion_tokens": 5}})
    assert patient.post(path, {}).status == 200
    assert patient.post(path, {}, **{CLASS: "hasty"}).status == 200
    until(lambda: counted(patient) == (1, 0) and counted(patient, "hasty") == (0, 1))
    answers[path] = Canned({"text": "of any length"})
    assert patient.post(path, {}, **{CLASS: "hasty"}).status == 200
    answers[path] = Canned({"error": "bad"}, 400)
    assert patient.post(path, {}).status == 400
    answers[path] = Canned("busy", 503)
    assert patient.post(path, {}).status == 503
    assert patient.post("/v1/embeddings", {}).status == 200
    until(lambda: counted(patient) == (1, 1))
    assert counted(patient, "hasty") == (0, 1)


def test_who_is_turned_away_has_missed_its_limits(start_router: Start) -> None:
    router = start_router(
        1, slo_ttft_ms=HOUR_MS, slo_tpot_ms=HOUR_MS, max_in_flight=1, max_queued=0
    )
    worker = router.instances[0].worker
    connection = router.open("POST", "/generate", {"stream": True})
    until(lambda: worker.streams)
    assert router.post("/generate", {}).error["code"] == "queue_full"
    until(lambda: counted(router) == (0, 1))
    worker.emit(b"data: 1\n\n")
    worker.finish()
    connection.getresponse().read()
    connection.close()
    until(lambda: counted(router) == (1, 1))


def test_a_stream_that_goes_on_elsewhere_is_one_stream(start_router: Start) -> None:
    router = start_router(2, slo_ttft_ms=HOUR_MS, slo_tpot_ms=HOUR_MS)
    with begun(router, with_record(1)) as stream:
        stream.gets(event(1))
        stream.owner.worker.die()
        other = stream.moved(stream.owner).worker
        other.emit(with_record(2))
        stream.gets(event(2))
        other.finish()
        assert stream.response.read() == b""
    until(lambda: counted(router) == (1, 0))
    samples = scrape(router)
    assert value(samples, "kunserve:streams_resumed_total") == 1
    assert value(samples, "kunserve:ttft_seconds_count") == 1
    assert value(samples, "kunserve:tpot_seconds_count") == 1


def test_what_is_cut_off_or_lost_has_missed_its_limits(patient: RouterCluster) -> None:
    worker = patient.instances[0].worker
    worker.journals = False
    with begun(patient, event(1)) as stream:
        stream.gets(event(1))
        worker.die()
        assert stream.last_error()["code"] == "stream_lost"
    until(lambda: counted(patient) == (0, 1))
    worker.die_before_headers = True
    assert patient.post("/generate", {}).status == 502
    until(lambda: counted(patient) == (0, 2))


def test_a_client_that_leaves_has_got_what_it_waited_for(patient: RouterCluster) -> None:
    worker = patient.instances[0].worker
    connection = patient.open("POST", "/generate", {"stream": True})
    until(lambda: worker.streams)
    connection.close()
    until(lambda: worker.left == 1)
    connection = patient.open("POST", "/generate", {"stream": True})
    until(lambda: worker.streams)
    worker.emit(b"data: 1\n\n")
    connection.getresponse().read1(100)
    connection.close()
    until(lambda: counted(patient) == (1, 0))


@pytest.mark.parametrize(
    ("header", "code"), [(TTFT, "bad_limit"), (TPOT, "bad_limit"), (CLASS, "unknown_class")]
)
def test_headers_that_make_no_sense_are_refused(
    idle_router: RouterCluster, header: str, code: str
) -> None:
    for method, path in (("GET", "/v1/models"), ("POST", "/v1/embeddings")):
        answer = idle_router.call(method, path, None, {header: "-1"})
        assert (answer.status, answer.error["code"]) == (400, code)
        assert answer.error["field"] == header
        assert header in answer.error["message"]
    assert not any(i.worker.requests("/v1/embeddings") for i in idle_router.instances)
    assert idle_router.post("/v1/completions", {}, **{TTFT: "250", TPOT: " 12.5 "}).status == 200


def test_nothing_is_promised_where_nobody_has_measured(
    start_router: Start, worker: MockWorker
) -> None:
    router = start_router(0, expect=0)
    number = router.post("/workers", {"url": worker.url}).json["id"]
    until(lambda: router.described(number)["serving"])
    worker.answers["/v1/completions"] = Canned("busy", 503)
    assert router.post("/v1/completions", {}).status == 503
    assert router.post("/v1/completions", {}, **{TTFT: "5"}).status == 503
    until(lambda: counted(router) == (0, 1))
    assert (seen(router)["ttft_ms"], seen(router)["tpot_ms"]) == (None, None)
    assert not any(name.startswith("kunserve:slo_ttft") for name, _ in scrape(router))


def test_limits_that_were_not_named_are_those_that_decide(
    start_router: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = CostModel(prefill=(1.0, 0.0, 0.5, 0.0, 0.0, 0.0), decode=(1.0, 1.0, 0.0))
    monkeypatch.setattr("kunserve_sglang.testing.mock_member.COSTS", costs)
    router = start_router(1)
    until(lambda: seen(router)["tpot_ms"] is not None)
    service, found = router.status()["service"], seen(router)
    assert service["ttft_ms"] == found["ttft_ms"] == 5 * LAYERS * (1 + 512 * 0.5)
    assert service["tpot_ms"] == found["tpot_ms"] > 5 * LAYERS


def test_who_looks_later_finds_what_was_before(patient: RouterCluster) -> None:
    def latest() -> Any:
        return patient.get("/kunserve/history").json["samples"][-1]

    until(lambda: latest()["capacity"] == CAPACITY)
    before = patient.get("/kunserve/history").json
    stream(patient)
    patient.instances[0].set_load(demand=321)
    until(lambda: latest()["demand"] == 321 and latest()["attainment"] == 1)
    after = patient.get("/kunserve/history").json
    assert after["samples"][: len(before["samples"])] == before["samples"]
    assert before["now"] <= after["samples"][-1]["time"] <= after["now"]
