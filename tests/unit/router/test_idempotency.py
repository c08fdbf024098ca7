"""What the router makes of an `Idempotency-Key`, and what it tells instances of it."""

from __future__ import annotations

import json
from collections.abc import Callable

import msgspec
import pytest

from kunserve_sglang.core.kept_answers import ANSWER_HEADER, ANSWERS_PATH, AnswerName
from tests.support.mock_instance import MockInstance
from tests.support.mock_worker import Canned, MockWorker, Seen
from tests.support.recorded_streams import BODY, event, with_record
from tests.support.router_harness import RouterCluster
from tests.support.waiting import until

Start = Callable[..., RouterCluster]
HEADER = ANSWER_HEADER.decode()
PATH = "/v1/completions"
ASKED = {"prompt": "x"}


def mine(key: str = "mine", **headers: str) -> dict[str, str]:
    return {"Idempotency-Key": key, **headers}


def named(seen: Seen) -> AnswerName:
    return msgspec.json.decode(seen.headers[HEADER], type=AnswerName)


def told(instance: MockInstance) -> list[tuple[str, str]]:
    """What was asked or said about answers, with the name."""
    return [(s.method, named(s).name) for s in instance.worker.requests(ANSWERS_PATH)]


def runs(router: RouterCluster, path: str = PATH) -> list[AnswerName]:
    return [named(s) for i in router.instances for s in i.worker.requests(path)]


def owner_of(router: RouterCluster, path: str = "/generate") -> MockInstance:
    def owners() -> list[MockInstance]:
        return [i for i in router.instances if i.worker.requests(path)]

    until(owners)
    return owners()[0]


def has_it(instance: MockInstance, name: AnswerName) -> None:
    instance.worker.answers[ANSWERS_PATH] = Canned({"request": name.request})


@pytest.mark.parametrize("key", ["", "two words", "x" * 256, "é"])
def test_what_is_no_key(idle_router: RouterCluster, key: str) -> None:
    answer = idle_router.call("POST", PATH, ASKED, {"Idempotency-Key": key.encode()})
    assert (answer.status, answer.error["code"]) == (400, "bad_idempotency_key")


@pytest.mark.parametrize("key", ["x", '"8e03978e-40d5-43dd-bc93-6894a57f9324"', "x" * 255])
def test_what_is_one(idle_router: RouterCluster, key: str) -> None:
    assert idle_router.post(PATH, ASKED, **mine(key)).status == 200


def test_questions_have_none(idle_router: RouterCluster) -> None:
    assert idle_router.get("/v1/models", **mine("two words")).status == 200
    assert HEADER not in idle_router.instances[0].worker.requests("/v1/models")[-1].headers


def test_who_asks_again_is_sent_to_who_has_the_answer(router: RouterCluster) -> None:
    assert router.post(PATH, ASKED, **mine()).status == 200
    (name,) = runs(router)
    assert name.key == router.config.instance_admin_key
    owner = owner_of(router, PATH)
    has_it(owner, name)
    owner.worker.answers[PATH] = Canned("the same")
    for _ in range(5):
        assert router.post(PATH, ASKED, **mine()).body == b"the same"
    assert runs(router) == [name] * 6
    assert told(owner) == [("GET", name.name)] * 5
    (other,) = (i for i in router.instances if i is not owner)
    assert told(other) == []


def test_what_is_not_kept_any_more_is_a_new_request(router: RouterCluster) -> None:
    router.post(PATH, ASKED, **mine())
    owner = owner_of(router, PATH)
    owner.worker.answers[ANSWERS_PATH] = Canned(status=404)
    assert router.post(PATH, ASKED, **mine()).status == 200
    assert router.post(PATH, {"prompt": "another one"}, **mine()).status == 200


def test_what_was_refused_is_a_new_request(start_router: Start) -> None:
    router = start_router(1)
    (instance,) = router.instances
    instance.worker.answers[PATH] = Canned("no", status=400)
    for prompt in ("x", "y"):
        assert router.post(PATH, {"prompt": prompt}, **mine()).status == 400
    assert told(instance) == []


@pytest.mark.parametrize("path", ["/v1/rerank", PATH + "?x"])
@pytest.mark.parametrize("body", [{"prompt": "another"}, {"prompt": "x", "n": 2}])
def test_a_key_stands_for_one_request(router: RouterCluster, path: str, body: object) -> None:
    router.post(PATH, ASKED, **mine())
    (name,) = runs(router)
    for instance in router.instances:
        has_it(instance, name)
    for other in (router.post(PATH, body, **mine()), router.post(path, ASKED, **mine())):
        assert (other.status, other.error["code"]) == (422, "idempotency_key_reused")
        assert other.error["field"] == "Idempotency-Key"
    assert len(runs(router)) == 1


def test_keys_of_others_are_others(router: RouterCluster) -> None:
    for who in ("Bearer me", "Bearer you"):
        assert router.post(PATH, ASKED, **mine(Authorization=who)).status == 200
    first, second = runs(router)
    assert first.name != second.name
    assert first.request == second.request
    assert all(told(i) == [] for i in router.instances)


def test_while_the_first_is_under_way(router: RouterCluster) -> None:
    connection = router.open("POST", "/generate", BODY, mine())
    owner = owner_of(router)
    again = router.post("/generate", BODY, **mine())
    assert (again.status, again.error["code"]) == (409, "request_under_way")
    other = router.post("/generate", {**BODY, "text": "y"}, **mine())
    assert (other.status, other.error["code"]) == (422, "idempotency_key_reused")
    owner.worker.finish()
    assert connection.getresponse().read() == b""
    connection.close()
    assert len(owner.worker.requests("/generate")) == 1


def test_that_a_client_has_left_is_said(start_router: Start) -> None:
    """And until its instance knows, the next request waits, or it would be given up as well."""
    router = start_router(1)
    (owner,) = router.instances
    connection = router.open("POST", "/generate", BODY, mine())
    until(lambda: owner.worker.streams)
    owner.worker.answers[ANSWERS_PATH] = Canned(status=404)  # it has not even arrived
    connection.close()
    until(lambda: len(told(owner)) > 1)
    owner.worker.answers[ANSWERS_PATH] = Canned(status=200)
    again = router.open("POST", "/generate", BODY, mine())
    until(lambda: len(runs(router, "/generate")) == 2)
    owner.worker.finish()
    assert again.getresponse().read() == b""
    again.close()
    first, second = runs(router, "/generate")
    assert first == second
    assert set(told(owner)) == {("DELETE", first.name)}
    calls = [s.target for s in owner.worker.seen if s.target in ("/generate", ANSWERS_PATH)]
    assert calls == ["/generate", *([ANSWERS_PATH] * len(told(owner))), "/generate"]


def test_who_leaves_without_a_key_needs_no_word(router: RouterCluster) -> None:
    connection = router.open("POST", "/generate", BODY)
    owner = owner_of(router)
    connection.close()
    until(lambda: owner.worker.left == 1)
    assert told(owner) == []


def test_an_instance_that_is_left_is_told(router: RouterCluster) -> None:
    connection = router.open("POST", "/generate", BODY, mine())
    owner = owner_of(router)
    (other,) = (i for i in router.instances if i is not owner)
    owner.worker.emit(with_record(1))
    response = connection.getresponse()
    assert response.read1(len(event(1))) == event(1)
    path = f"/workers/{owner.number}?timeout_s=20&wait=false&migrate=true"
    assert router.call("DELETE", path).status == 202
    until(lambda: other.worker.streams)
    until(lambda: told(owner))
    assert [method for method, _ in told(owner)] == ["DELETE"]
    # The rest of a stream is no answer for who asks for all of it.
    assert HEADER not in other.worker.requests("/generate")[-1].headers
    other.worker.emit(with_record(2))
    other.worker.finish()
    assert response.read() == event(2)
    connection.close()
    other.worker.answers[ANSWERS_PATH] = Canned(status=404)
    again = router.open("POST", "/generate", BODY, mine())
    until(lambda: len(other.worker.requests("/generate")) == 2)
    assert told(other) == []
    again.close()


def test_if_who_has_the_answer_is_gone_it_is_made_again(router: RouterCluster) -> None:
    router.post(PATH, ASKED, **mine())
    owner = owner_of(router, PATH)
    has_it(owner, runs(router)[0])
    owner.worker.die_before_headers = True
    (other,) = (i for i in router.instances if i is not owner)
    assert router.post(PATH, ASKED, **mine()).json["path"] == PATH
    assert other.worker.requests(PATH)
    owner.stop()
    assert router.post(PATH, ASKED, **mine()).status == 200


def test_a_router_after_another_asks_all(router: RouterCluster) -> None:
    router.stop_router()
    router.start_router()
    router.ready(2)
    for instance in router.instances:
        instance.worker.answers[ANSWERS_PATH] = Canned(status=404)
    router.post(PATH, ASKED, **mine())
    (name,) = runs(router)
    assert [told(i) for i in router.instances] == [[("GET", name.name)]] * 2
    other = msgspec.structs.replace(name, name="theirs")
    router.instances[0].worker.answers[ANSWERS_PATH] = Canned({"request": other.request})
    router.instances[1].worker.answers[ANSWERS_PATH] = Canned("no JSON")
    for _ in range(3):
        router.post(PATH, ASKED, **mine("theirs"))
    assert len(router.instances[0].worker.requests(PATH)) >= 3


def test_nothing_of_it_goes_to_plain_servers(start_router: Start, worker: MockWorker) -> None:
    router = start_router(0)
    assert router.post("/workers", {"url": worker.url}).status == 201
    until(lambda: router.get("/readiness").json.get("available") == 1)
    for _ in range(2):
        assert router.post(PATH, ASKED, **mine()).status == 200
    assert all(HEADER not in seen.headers for seen in worker.requests(PATH))
    assert worker.requests(ANSWERS_PATH) == []


def test_clients_cannot_name_answers(router: RouterCluster) -> None:
    name = AnswerName(key=router.config.instance_admin_key, name="n", request="r")
    value = msgspec.json.encode(name).decode()
    router.post(PATH, ASKED, **{HEADER: value})
    (seen,) = (s for i in router.instances for s in i.worker.requests(PATH))
    assert HEADER not in seen.headers
    assert router.call("GET", ANSWERS_PATH, headers={HEADER: value}).status == 404
    assert json.loads(seen.body) == ASKED
