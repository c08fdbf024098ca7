"""Clients of a router that has ended ask the next one, by the id of their request.

The router is a process of its own, and so is each that follows; instances go on meanwhile.
"""

from __future__ import annotations

import http.client
import json
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from kunserve_sglang.core.fault_points import POINTS
from tests.support.background import Background
from tests.support.keeping_server import (
    DONE,
    KeepingServer,
    event,
    whole_answer,
    whole_stream,
)
from tests.support.router_process import RouterInProcess
from tests.support.waiting import until

KEY = "what instances know the router by"
PLAIN = [f"plain {n}" for n in range(4)]
STREAMS = [f"stream {n}" for n in range(4)]


class Scene:
    def __init__(self, folder: Path) -> None:
        self.background = Background()
        self.servers = [KeepingServer(self.background, KEY) for _ in range(2)]
        urls = [server.url for server in self.servers]
        self.router = RouterInProcess(folder, self.background, urls, KEY)
        self.router.start()

    def ask(self, text: str, key: str | None = "") -> http.client.HTTPConnection:
        """By default under a key that says the same."""
        body = {"text": text, "stream": text in STREAMS}
        headers = {} if key is None else {"Idempotency-Key": key or text.replace(" ", "-")}
        return self.router.client.open("POST", "/generate", body, headers)

    def go(self, *texts: str, steps: int = 1) -> None:
        for server in self.servers:
            for text in texts:
                server.go(text, steps)

    @property
    def runs(self) -> Counter[str]:
        return sum((server.runs for server in self.servers), Counter())

    @property
    def steps(self) -> Counter[str]:
        return sum((server.steps for server in self.servers), Counter())

    @property
    def left(self) -> list[str]:
        return sorted(text for server in self.servers for text in server.left)

    def close(self) -> None:
        self.router.close()
        for server in self.servers:
            server.close()
        self.background.stop()


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(tmp_path)
    yield scene
    scene.close()


def breaks_off(connection: http.client.HTTPConnection) -> bytes:
    """All that comes; it is seen to be no whole answer, by whatever reads HTTP."""
    with pytest.raises((http.client.HTTPException, ConnectionError)) as broken:
        connection.getresponse().read()
    connection.close()
    return broken.value.partial if isinstance(broken.value, http.client.IncompleteRead) else b""


def answer(connection: http.client.HTTPConnection) -> bytes:
    response = connection.getresponse()
    assert response.status == 200
    whole = response.read()
    connection.close()
    return whole


def test_what_was_under_way_is_there_for_who_asks_again(scene: Scene) -> None:
    texts = [*PLAIN, *STREAMS]
    before = {text: scene.ask(text) for text in texts}
    scene.go(*texts)
    until(lambda: scene.steps == dict.fromkeys(texts, 1))
    scene.router.end()
    for text, connection in before.items():
        got = breaks_off(connection)
        assert got in (b"", event(text, 1))
    scene.go(*PLAIN[:2], *STREAMS[:2], steps=3)  # nobody is there, and half of them are whole
    until(lambda: sum(scene.steps.values()) == 4 * 3 + 4 * 1)
    scene.router.start()
    after = {text: scene.ask(text) for text in texts}
    scene.go(*PLAIN[2:], *STREAMS[2:], steps=3)
    for text in PLAIN:
        assert json.loads(answer(after[text])) == whole_answer(text)
    for text in STREAMS:
        assert answer(after[text]) == whole_stream(text)
    assert scene.runs == dict.fromkeys(texts, 1)
    assert scene.steps == dict.fromkeys(texts, 3)
    assert scene.left == []


@pytest.mark.parametrize("kind", ["crash", "hang"])
@pytest.mark.parametrize("point", sorted(name for name in POINTS if name.startswith("proxy.")))
def test_wherever_it_ends_or_stands_still(scene: Scene, point: str, kind: str) -> None:
    scene.router.end()
    process = scene.router.start(f"{point}:{kind}:1")
    connection = scene.ask(STREAMS[0])
    scene.go(STREAMS[0])
    wanted = psutil.STATUS_STOPPED if kind == "hang" else psutil.STATUS_ZOMBIE
    until(lambda: process.status() == wanted)
    scene.router.end()
    breaks_off(connection)
    scene.router.start()
    again = scene.ask(STREAMS[0])
    scene.go(STREAMS[0], steps=3)
    assert answer(again) == whole_stream(STREAMS[0])
    assert scene.runs == {STREAMS[0]: 1}


def test_the_router_after_the_next_one_knows_them_too(scene: Scene) -> None:
    text = PLAIN[0]
    for _ in range(3):
        connection = scene.ask(text)
        until(lambda: scene.runs[text])
        scene.router.end()
        breaks_off(connection)
        scene.router.start()
    connection = scene.ask(text)
    scene.go(text, steps=4)
    assert json.loads(answer(connection)) == whole_answer(text)
    assert scene.runs == {text: 1}


@pytest.mark.parametrize("text", [PLAIN[0], STREAMS[0]])
def test_an_answer_that_had_come_is_not_made_again(scene: Scene, text: str) -> None:
    """Nobody but its client knows whether it has it."""
    connection = scene.ask(text)
    scene.go(text, steps=4)
    whole = answer(connection)
    assert answer(scene.ask(text)) == whole
    scene.router.end()
    scene.router.start()
    assert answer(scene.ask(text)) == whole
    assert scene.runs == {text: 1}


def test_without_a_key_they_end_with_their_router(scene: Scene) -> None:
    connection = scene.ask(STREAMS[0], key=None)
    scene.go(STREAMS[0])
    until(lambda: scene.steps[STREAMS[0]])
    scene.router.end()
    breaks_off(connection)
    until(lambda: scene.left == [STREAMS[0]])


def test_a_client_that_leaves_is_no_router_that_ends(scene: Scene) -> None:
    connections = [scene.ask(STREAMS[0]), scene.ask(PLAIN[0])]
    scene.go(STREAMS[0], PLAIN[0])
    until(lambda: scene.steps == {STREAMS[0]: 1, PLAIN[0]: 1})
    for connection in connections:
        connection.close()
    until(lambda: scene.left == [STREAMS[0]])
    scene.go(PLAIN[0])
    until(lambda: scene.left == [PLAIN[0], STREAMS[0]])
    again = scene.ask(STREAMS[0])
    scene.go(STREAMS[0], steps=3)
    assert answer(again) == whole_stream(STREAMS[0])
    assert scene.runs[STREAMS[0]] == 2


def test_a_router_that_is_asked_to_end_leaves_them_to_the_next(scene: Scene) -> None:
    """Those that wait hear of it: a stream by its last event."""
    texts = (PLAIN[0], STREAMS[0])
    plain, stream = (scene.ask(text) for text in texts)
    scene.go(*texts)
    until(lambda: scene.steps == dict.fromkeys(texts, 1))
    scene.router.end(signal.SIGTERM)
    refused = plain.getresponse()
    assert refused.status == 503
    assert json.loads(refused.read())["error"]["code"] == "router_stopping"
    plain.close()
    first, _, rest = breaks_off(stream).partition(b"\n\n")
    assert first + b"\n\n" == event(STREAMS[0], 1)
    assert b'"code":"router_stopping"' in rest
    assert DONE not in rest
    scene.router.start()
    plain, stream = (scene.ask(text) for text in texts)
    scene.go(*texts, steps=3)
    assert json.loads(answer(plain)) == whole_answer(PLAIN[0])
    assert answer(stream) == whole_stream(STREAMS[0])
    assert scene.runs == dict.fromkeys(texts, 1)


def test_what_nobody_knows_any_more_is_a_new_request(scene: Scene) -> None:
    """As what the router had not sent, and what instances had no memory for."""
    scene.router.end()
    scene.router.start()
    connection = scene.ask(PLAIN[0])
    scene.go(PLAIN[0], steps=4)
    assert json.loads(answer(connection)) == whole_answer(PLAIN[0])


def test_another_request_under_the_same_key_is_refused_by_the_next_router(scene: Scene) -> None:
    connection = scene.ask(PLAIN[0], "mine")
    until(lambda: scene.runs[PLAIN[0]])
    scene.router.end()
    breaks_off(connection)
    scene.router.start()
    refused = scene.ask(PLAIN[1], "mine").getresponse()
    assert refused.status == 422
    assert json.loads(refused.read())["error"]["code"] == "idempotency_key_reused"
    scene.go(PLAIN[0], steps=4)
    assert json.loads(answer(scene.ask(PLAIN[0], "mine"))) == whole_answer(PLAIN[0])
    assert scene.runs == {PLAIN[0]: 1}
