"""Streams whose instance dies go on at another one, or end with an event that says why not."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

import pytest

from kunserve_sglang.core.resumption import (
    COMMENT,
    JOURNAL_HEADER,
    NOT_RESUMABLE,
    RESUMABLE_PATHS,
    RESUME_HEADER,
    reports_error,
)
from kunserve_sglang.router.http.answers import error_event
from kunserve_sglang.router.proxy.journal import Journal, Journals
from tests.support.mock_worker import MockWorker
from tests.support.recorded_streams import BODY, asked, begun, event, with_record
from tests.support.router_harness import RouterCluster
from tests.support.waiting import until

Start = Callable[..., RouterCluster]
ASKED, RESUMED = JOURNAL_HEADER.decode(), RESUME_HEADER.decode()


def test_records_stay_in_the_router(router: RouterCluster) -> None:
    with begun(router, with_record(1)) as stream:
        stream.gets(event(1))
        assert stream.response.getheader(ASKED) is None
        half = with_record(2)
        for cut in range(0, len(half), 7):
            stream.owner.worker.emit(half[cut : cut + 7])
        stream.gets(event(2))
        stream.owner.worker.emit(b"data: without an end")
        stream.owner.worker.finish()
        assert stream.response.read() == b"data: without an end"


def test_another_instance_goes_on_with_it(router: RouterCluster) -> None:
    with begun(router, with_record(1), with_record(2)) as stream:
        stream.gets(event(1) + event(2))
        stream.owner.worker.emit(with_record(3)[:-5])
        stream.owner.worker.die()
        other = stream.moved(stream.owner).worker
        headers, body = asked(other)
        mine = json.dumps(BODY).encode()
        assert body == mine + b"record 1\nrecord 2\n"
        assert headers["content-length"] == str(len(body))
        assert json.loads(headers[RESUMED]) == {
            "body_bytes": len(mine),
            "events": 2,
            "created": 101,
        }
        other.emit(with_record(3))
        other.emit(b"data: [DONE]\n\n")
        other.finish()
        assert stream.response.read() == event(3) + b"data: [DONE]\n\n"
    metrics = router.get("/metrics").body
    assert b"kunserve:streams_resumed_total 1.0" in metrics
    assert b"kunserve:answers_cut_total 0.0" in metrics


def test_what_has_no_event_yet_begins_anew(router: RouterCluster) -> None:
    with begun(router) as stream:
        assert stream.response.status == 200
        stream.owner.worker.emit(with_record(1)[:-3])
        stream.owner.worker.die()
        other = stream.moved(stream.owner).worker
        headers, body = asked(other)
        assert RESUMED not in headers
        assert json.loads(body) == BODY
        other.emit(with_record(1))
        other.finish()
        assert stream.response.read() == event(1)


def test_a_whole_stream_is_whole_without_its_instance(router: RouterCluster) -> None:
    with begun(router, with_record(1) + b"data: [DONE]\n\n") as stream:
        stream.gets(event(1) + b"data: [DONE]\n\n")
        stream.owner.worker.die()
        assert stream.response.read() == b""


def test_one_that_no_instance_can_resume_says_so(router: RouterCluster) -> None:
    with begun(router, b"%b%b\n%b" % (COMMENT, NOT_RESUMABLE, event(1))) as stream:
        stream.gets(event(1))
        stream.owner.worker.die()
        assert "cannot be resumed" in stream.last_error()["message"]
    assert b"kunserve:answers_cut_total 1.0" in router.get("/metrics").body


@pytest.mark.parametrize("path", sorted(RESUMABLE_PATHS))
def test_its_last_event_is_as_its_api_has_it(path: str) -> None:
    event = error_event(path, 502, "stream_lost", "why")
    assert reports_error(event)
    assert event.startswith(b"\n\n")
    *name, data = event.strip().split(b"\n")
    assert name == ([b"event: error"] if path == "/v1/messages" else [])
    said = json.loads(data.removeprefix(b"data: "))
    assert (said["error"]["code"], said["error"]["message"]) == ("stream_lost", "why")
    assert said.get("type", "error") == "error"


def test_one_that_has_become_too_large_says_so(start_router: Start) -> None:
    router = start_router(2, resume_memory=6000)
    large = [b"%b%b\n%b" % (COMMENT, b"x" * 1000, event(n)) for n in range(9)]
    with begun(router, *large) as stream:
        stream.gets(b"".join(map(event, range(9))))
        stream.owner.worker.die()
        assert "cannot be resumed" in stream.last_error()["message"]
    # Its memory is free again.
    with begun(router, with_record(1)) as stream:
        stream.gets(event(1))
        stream.owner.worker.die()
        stream.moved(stream.owner).worker.finish()
        assert stream.response.read() == b""


def test_a_journal_is_the_same_however_its_stream_is_cut() -> None:
    journals = Journals(1 << 20, "key")
    numbers = range(1, 40)
    stream = b"".join(
        with_record(n) if n % 5 else b"%bmore\n" % COMMENT + with_record(n) + event(0)
        for n in numbers
    )
    events = [event(n) + (b"" if n % 5 else event(0)) for n in numbers]
    whole = Journal(journals)
    assert whole.pass_on(stream) == b"".join(events)
    for seed in range(50):
        rng, rest, journal = random.Random(seed), stream, Journal(journals)
        passed = []
        while rest:
            # Now and then whole events, as they mostly come.
            cut = rest.index(b"\n\n") + 2 if rng.random() < 0.5 else rng.randrange(1, 90)
            passed.append(journal.pass_on(rest[:cut]))
            assert passed[-1] == b"" or passed[-1].endswith(b"\n\n")
            rest = rest[cut:]
        assert b"".join(passed) == b"".join(events)
        assert journal.question(b"body") == whole.question(b"body")
        assert journal.events == whole.events == 46
        journal.close()
    whole.close()
    assert journals.used == 0


def test_what_two_instances_were_lost_with_is_not_tried_again(start_router: Start) -> None:
    router = start_router(3)
    with begun(router, with_record(1)) as stream:
        stream.gets(event(1))
        stream.owner.worker.die()
        second = stream.moved(stream.owner)
        second.worker.die()
        assert "not tried again" in stream.last_error()["message"]
    assert sum(len(i.worker.requests("/generate")) for i in router.instances) == 2


def test_without_another_instance_it_ends_with_an_error(start_router: Start) -> None:
    router = start_router(1, queue_timeout_s=0.1)
    with begun(router, with_record(1)) as stream:
        stream.gets(event(1))
        stream.owner.worker.die()
        assert "no other" in stream.last_error()["message"]


def test_a_lone_instance_that_is_started_again_goes_on_with_it(start_router: Start) -> None:
    router = start_router(1)
    with begun(router, with_record(1)) as stream:
        stream.gets(event(1))
        stream.owner.worker.die()
        stream.owner.stop()
        until(lambda: router.described(0).get("lost") == "connection refused")
        connection = router.open("POST", "/v1/completions", {"prompt": "came meanwhile"})
        until(lambda: router.status()["queue"]["requests"] == 1)
        router.instances[0] = router.add(0)
        again = stream.moved(stream.owner).worker
        assert asked(again)[1] == json.dumps(BODY).encode() + b"record 1\n"
        again.emit(with_record(2))
        again.finish()
        assert stream.response.read() == event(2)
        assert connection.getresponse().status == 200
        connection.close()


def test_an_instance_that_keeps_no_journal(router: RouterCluster) -> None:
    for instance in router.instances:
        instance.worker.journals = False
    with begun(router, event(1)) as stream:
        stream.gets(event(1))
        stream.owner.worker.die()
        assert stream.last_error()
    assert sum(len(i.worker.requests("/generate")) for i in router.instances) == 1


def test_one_that_refuses_to_go_on(router: RouterCluster) -> None:
    with begun(router, with_record(1)) as stream:
        stream.gets(event(1))
        (other,) = (i for i in router.instances if i is not stream.owner)
        other.worker.journals = False
        stream.owner.worker.die()
        stream.moved(stream.owner)
        other.worker.emit(event(2))
        other.worker.finish()
        assert b'"n"' not in stream.rest()


def test_clients_cannot_ask_for_records(router: RouterCluster) -> None:
    router.post("/v1/completions", {"prompt": "x"}, **{ASKED: "1", RESUMED: "2"})
    (seen,) = (s for i in router.instances for s in i.worker.requests("/v1/completions"))
    assert {ASKED, RESUMED}.isdisjoint(seen.headers)


def test_only_instances_get_the_key_of_the_router(start_router: Start, worker: MockWorker) -> None:
    router = start_router(1)
    (instance,) = router.instances
    with begun(router, with_record(1)) as stream:
        assert asked(instance.worker)[0][ASKED] == router.config.instance_admin_key
        stream.gets(event(1))
    router.post("/v1/rerank", {"stream": True})
    assert ASKED not in instance.worker.requests("/v1/rerank")[-1].headers
    assert router.post("/workers", {"url": worker.url}).status == 201
    instance.set_load(demand=1000)
    until(lambda: router.get("/readiness").json.get("available") == 2)

    def it_gets_one() -> bool:
        router.post("/v1/completions", {"stream": 0})
        return bool(worker.requests("/v1/completions"))

    until(it_gets_one)
    assert ASKED not in worker.requests("/v1/completions")[-1].headers
