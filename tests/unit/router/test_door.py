"""What comes in from clients, and what never reaches an instance however it is written."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kunserve_sglang.core.routes import SERVER_ROUTES, Handling, ServerRoute
from tests.support.mock_worker import Canned
from tests.support.router_harness import RouterCluster
from tests.support.waiting import until

Start = Callable[..., RouterCluster]

OWN_QUESTIONS = ("/health", "/model_info")
"""What the router asks mock instances by itself."""

FORWARDED = [r for r in SERVER_ROUTES if r.handling is Handling.FORWARD]
GUARDED = [
    *(r for r in SERVER_ROUTES if r.handling in (Handling.TO_ALL, Handling.REFUSE)),
    *(
        ServerRoute(path, ("GET", "POST"), Handling.HIDE)
        for path in ("/dumper/reset", "/redoc", "/kunserve/drop", "/nothing")
    ),
]
REFUSALS = {400, 401, 404, 405, 501}


@pytest.fixture(scope="module")
def locked() -> Iterator[RouterCluster]:
    """Two instances behind a router with an admin key."""
    router = RouterCluster(2, admin_api_key="s3cret")
    yield router
    router.close()


def ask(router: RouterCluster, method: bytes, target: bytes, more: bytes = b"") -> int:
    """The status of the answer to a request whose target stands there as it is."""
    with socket.create_connection(("127.0.0.1", router.port), timeout=20) as client:
        client.sendall(
            b"%b %b HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nConnection: close\r\n%b\r\n{}"
            % (method, target, more)
        )
        return int(client.makefile("rb").readline().split()[1])


def arrived(router: RouterCluster) -> Counter[tuple[str, str]]:
    """Methods and targets of all that instances have got, but for what the router asks itself."""
    return Counter(
        (s.method, s.target)
        for i in router.instances
        for s in i.worker.seen
        if s.target not in OWN_QUESTIONS
    )


def disguises(path: bytes) -> Iterator[bytes]:
    """The ways to write `path` that some server or other would take for it."""
    name = path[1:]
    first, encoded = name[:1], b"".join(b"%%%02x" % byte for byte in name)
    yield from (path + end for end in (b"#", b"#x", b"#?x", b"?#", b"?a=1#x", b"?", b"??", b"?a=1"))
    yield from (path + end for end in (b"/", b"//", b"/.", b"/..;/", b";", b";a=1", b".json", b"*"))
    yield from (path + end for end in (b"%00", b"%09", b"%0a", b"%20", b"%23", b"%2f", b"%3f"))
    yield from (path + end for end in (b"\t", b"\x00", b"\x0b", b"\x7f", b"\xa0", b"\xc3\xa9"))
    yield from (start + path for start in (b"/", b"//", b"/.", b"/x/..", b"/%2e", b"/;", b"/v1"))
    yield from (start + name for start in (b"", b"%2f", b"/%2f", b"\\", b"/\\", b"/\t", b"/\x00"))
    yield from (b"/" + encoded, b"/%%%02X" % first[0] + name[1:], b"/%25" + encoded[1:])
    yield from (path.upper(), path.title(), path.replace(b"_", b"-"), path.replace(b"/", b"//"))
    yield from (b"/%c0%ae%c0%ae" + path, b"/" + first + b"\xcc\x81" + name[1:])
    for host in (b"http://x", b"http://127.0.0.1:1", b"https://x", b"//x", b"@x", b"x:80"):
        yield host + path
    for inside in (b"/v1/models", b"/v1/responses", b"/generate", b"/health", b"/workers"):
        for up in (b"/..", b"/../..", b"/%2e%2e", b"/..%2f..", b"%2f..%2f..", b"/.;/..", b"/x/.."):
            yield inside + up + path


@pytest.mark.parametrize("route", GUARDED, ids=lambda route: route.path)
def test_no_disguise_opens_what_is_shut(locked: RouterCluster, route: ServerRoute) -> None:
    before = arrived(locked)
    path = route.path.encode()
    for target in (path, *disguises(path)):
        for method in (*route.methods, "OPTIONS"):
            assert ask(locked, method.encode(), target) in REFUSALS, target
    assert arrived(locked) == before


def test_nor_do_headers(locked: RouterCluster) -> None:
    before = arrived(locked)
    for header in (
        b"X-Original-URL: /flush_cache\r\n",
        b"X-HTTP-Method-Override: GET\r\n",
        b"X-Forwarded-Prefix: /flush_cache\r\n",
        b"Upgrade: h2c\r\nConnection: Upgrade\r\n",
        b"Upgrade: websocket\r\nConnection: Upgrade\r\n",
    ):
        assert ask(locked, b"POST", b"/flush_cache", header) == 401
        assert ask(locked, b"POST", b"/flush_cache#", header) == 400
        assert ask(locked, b"GET", b"/v1/realtime", header) == 501
    # A URL is made of this header by many a library.
    for host in (b"x/flush_cache?", b"x/flush_cache#", b"x@y"):
        with socket.create_connection(("127.0.0.1", locked.port), timeout=20) as client:
            client.sendall(
                b"GET /v1/loads HTTP/1.1\r\nHost: %b\r\nConnection: close\r\n\r\n" % host
            )
            client.makefile("rb").read()
    assert {target for _, target in arrived(locked) - before} <= {"/v1/loads"}


_PIECES = st.sampled_from(
    [b"/", b"//", b".", b"..", b"%2f", b"%2F", b"%2e", b"#", b"?", b";", b"\\", b"\t", b"%00", b"*",
     b"v1", b"models", b"responses", b"resp_1", b"cancel", b"generate", b"flush_cache", b"health",
     b"weights_checker", b"hicache", b"storage-backend", b"workers", b"kunserve", b"http:", b"x"]
)  # fmt: skip


@settings(max_examples=300)
@given(
    method=st.sampled_from([b"GET", b"POST", b"PUT", b"DELETE", b"OPTIONS", b"HEAD"]),
    pieces=st.lists(_PIECES | st.binary(min_size=1, max_size=2), min_size=1, max_size=8),
    absolute=st.booleans(),
)
@example(method=b"POST", pieces=[b"flush_cache", b"#"], absolute=True)
@example(method=b"GET", pieces=[b"v1", b"/", b"models", b"/", b"..", b"/", b"x"], absolute=True)
def test_what_arrives_is_what_was_let_in(
    locked: RouterCluster, method: bytes, pieces: list[bytes], absolute: bool
) -> None:
    """An instance gets a path of the list as the client has written it, or it gets nothing."""
    target = b"/" * absolute + b"".join(pieces)
    if not target.strip() or any(byte in target for byte in b" \r\n"):
        return  # it would be another request line
    before = arrived(locked)
    ask(locked, method, target)
    for got_method, got in arrived(locked) - before:
        path, _, query = got.partition("?")
        assert got.encode() in (target, target.rstrip(b"?"))
        assert got_method.encode() == method
        assert not set(query) & set("#\\\t")
        assert ".." not in path.split("/")
        assert path in {r.path for r in SERVER_ROUTES if r.handling.open} or path.startswith(
            ("/v1/models/", "/v1/responses/")
        )


@pytest.mark.parametrize("route", FORWARDED, ids=lambda route: route.path)
def test_the_rest_comes_through_as_it_is(idle_router: RouterCluster, route: ServerRoute) -> None:
    path = route.path.replace("{model:path}", "org%2Fname-7B")
    for method in (*route.methods, "OPTIONS"):
        before = arrived(idle_router)
        target = f"{path}?a=%23b&c=[/../x]"
        assert ask(idle_router, method.encode(), target.encode()) == 200
        assert arrived(idle_router) - before == {(method, target): 1}


@pytest.mark.parametrize("route", SERVER_ROUTES, ids=lambda route: route.path)
def test_other_methods_are_told_which_are_right(
    idle_router: RouterCluster, route: ServerRoute
) -> None:
    path = route.path.replace("{model:path}", "m").replace("{response_id}", "resp_1")
    answer = idle_router.call("PATCH", path)
    expected = {Handling.REFUSE: 501, Handling.HIDE: 404}.get(route.handling, 405)
    assert answer.status == expected
    if answer.status == 405:
        assert answer.error["code"] == "method_not_allowed"
        assert set(route.methods) <= set(answer.headers["allow"].split(", "))


def test_all_methods_of_a_path_are_named(idle_router: RouterCluster) -> None:
    assert idle_router.put("/workers").headers["allow"] == "GET, HEAD, POST"
    assert idle_router.call("HEAD", "/flush_cache").status == 405


@pytest.mark.parametrize(
    "line", [b"CONNECT x:80", b"CONNECT 127.0.0.1:22", b"OPTIONS *", b"GET *", b"GET http://x/"]
)
def test_what_names_another_host_or_none_is_refused(
    idle_router: RouterCluster, line: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_connection(("127.0.0.1", idle_router.port), timeout=20) as client:
        client.sendall(b"%b HTTP/1.1\r\nHost: x\r\n\r\nGET / HTTP/1.1\r\nHost: x\r\n\r\n" % line)
        assert b" 400 " in client.makefile("rb").readline()
    assert not caplog.records


def test_upgrades_are_declined_one_after_the_other(idle_router: RouterCluster) -> None:
    offer = b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
    with socket.create_connection(("127.0.0.1", idle_router.port), timeout=20) as client:
        last = b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        client.sendall(offer * 3 + last)
        assert client.makefile("rb").read().count(b"HTTP/1.1 200 OK") == 4


REDIRECT = Canned("", 307, {"Location": "http://10.0.0.7:1/elsewhere"})


def test_redirects_are_not_passed_on(start_router: Start) -> None:
    router = start_router(1)
    worker = router.instances[0].worker
    for path in ("/v1/completions", "/flush_cache", "/get_load", "/v1/loads", "/server_info"):
        worker.answers[path] = REDIRECT
        answer = router.call("POST" if path in ("/v1/completions", "/flush_cache") else "GET", path)
        assert (answer.status, answer.error["code"]) == (502, "instance_failed")
        assert b"10.0.0.7" not in b"".join([answer.body, repr(answer.headers).encode()])
    assert router.post("/v1/score").status == 200  # the connection can still be used


def test_redirects_are_not_followed(start_router: Start) -> None:
    router = start_router(2)
    first, second = (i.worker for i in router.instances)
    redirect = Canned("", 307, {"Location": f"{second.url}/elsewhere"})
    for path in ("/health_generate", "/flush_cache", "/v1/loads", "/server_info", "/metrics"):
        first.answers[path] = redirect
        router.get(path)
        assert first.requests(path)
    router.instances.append(router.add(2))
    third = router.instances[2].worker
    third.answers["/health"] = redirect
    until(lambda: len(third.requests("/health")) > 2)
    assert not second.requests("/elsewhere")


def test_a_trailing_slash_is_another_path(idle_router: RouterCluster) -> None:
    answer = idle_router.get("/flush_cache/")
    assert (answer.status, answer.error["code"]) == (404, "not_found")
    assert "location" not in answer.headers


def test_a_response_is_found_where_it_was_made(start_router: Start) -> None:
    router = start_router(2)
    missing, there = (i.worker for i in router.instances)
    for path, method in (("/v1/responses/resp_1", "GET"), ("/v1/responses/resp_1/cancel", "POST")):
        missing.answers[path] = Canned({"error": "no"}, 404)
        there.answers[path] = Canned({"id": "resp_1"})
        for _ in range(3):
            assert router.call(method, path).json == {"id": "resp_1"}
        there.answers[path] = Canned({"error": "not in the background"}, 400)
        assert router.call(method, path).status == 400
        there.answers[path] = Canned({"error": "no"}, 404)
        assert router.call(method, path).status == 404
