"""SGLang's own routes, with requests that its server would answer with a 500 or not as meant."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.types import Message

from kunserve_sglang.core.routes import SERVER_ROUTES, Handling
from kunserve_sglang.sglang_seam.answers import (
    mend_answers,
    ollama_answer,
    text_only_anthropic,
    text_only_messages,
)
from kunserve_sglang.sglang_seam.nulls import NullsAreDefaults, nullless_bodies
from tests.support.sglang_app import Serving, TokenizerManager

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")

MESSAGES = [{"role": "user", "content": "Hi"}]
MINIMAL = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/completions": {"model": "m", "prompt": "Hi"},
    "/v1/responses": {"input": "Hi"},
    "/v1/embeddings": {"model": "m", "input": "Hi"},
    "/api/chat": {"model": "m", "messages": MESSAGES},
    "/api/generate": {"model": "m", "prompt": "Hi"},
}
"""The least that the routes of other APIs take."""


@pytest.fixture
def manager() -> TokenizerManager:
    return TokenizerManager()


@pytest.fixture
def app(manager: TokenizerManager, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """SGLang's, as an instance has it before it serves, and as it was again afterwards."""
    from sglang.srt.entrypoints import http_server
    from sglang.srt.entrypoints.ollama.serving import OllamaServing

    app = http_server.app
    before = (list(app.user_middleware), dict(app.exception_handlers), app.middleware_stack)
    app.middleware_stack = None
    mend_answers(app, manager)
    for name in ("handle_chat", "handle_generate"):
        handle = getattr(OllamaServing, name)

        async def around(self: Any, *args: Any, handle: Any = handle) -> Any:
            return await ollama_answer(handle, self, *args)

        monkeypatch.setattr(OllamaServing, name, around)
    state = SimpleNamespace(tokenizer_manager=manager)
    monkeypatch.setattr(http_server, "_global_state", state)
    for kind in ("chat", "completion", "responses", "embedding"):
        monkeypatch.setattr(app.state, f"openai_serving_{kind}", Serving(), raising=False)
    ollama = OllamaServing(manager)
    monkeypatch.setattr(app.state, "ollama_serving", ollama, raising=False)
    yield app
    app.user_middleware[:], app.middleware_stack = before[0], before[2]
    app.exception_handlers.clear()
    app.exception_handlers.update(before[1])


def post(app: Any, path: str, body: Any) -> tuple[int, Any]:
    """Status and JSON (or text) of the answer; what a server would log is raised."""
    sent: list[Message] = []
    parts = [json.dumps(body).encode()]
    parts = [parts[0][:9], parts[0][9:]]

    async def receive() -> Message:
        if not parts:
            await asyncio.sleep(3600)
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": path, "root_path": "", "query_string": b"",
        "headers": [(b"content-type", b"application/json")], "app": app,
    }  # fmt: skip
    asyncio.run(asyncio.wait_for(app(scope, receive, send), 30))
    text = b"".join(message.get("body", b"") for message in sent[1:]).decode()
    try:
        return sent[0]["status"], json.loads(text)
    except ValueError:
        return sent[0]["status"], text


def fields_of(path: str) -> list[str]:
    from sglang.srt.entrypoints.http_server import app

    return sorted(nullless_bodies(app)[path])


@pytest.mark.parametrize("path", MINIMAL)
def test_null_is_the_default_of_a_field(app: Any, path: str) -> None:
    nulls = dict.fromkeys(fields_of(path))
    assert nulls
    status, answer = post(app, path, MINIMAL[path] | nulls)
    assert status == 200, answer
    if not path.startswith("/api"):
        assert not [name for name in nulls if answer.get(name, "") is None]


def test_the_known_nulls_are_among_them() -> None:
    assert {"logprobs", "n", "stream", "frequency_penalty"} <= set(
        fields_of("/v1/chat/completions")
    )
    assert {"temperature", "echo"} <= set(fields_of("/v1/completions"))


def test_what_has_to_be_there_may_not_be_null(app: Any) -> None:
    status, answer = post(app, "/v1/chat/completions", {"messages": None})
    assert status == 400
    assert answer["message"].startswith("messages")
    assert "\n" not in answer["message"]
    assert ".py" not in answer["message"]


def test_every_route_with_a_body_is_looked_at() -> None:
    from sglang.srt.entrypoints.http_server import app

    forwarded = {r.path for r in SERVER_ROUTES if r.handling is Handling.FORWARD}
    assert set(MINIMAL) <= set(nullless_bodies(app)) & forwarded


@pytest.mark.parametrize("body", [b'{"a": null', b"[null]", b'{"b": null}', b'{"a": 1}'])
def test_other_bodies_stay_as_they_are(body: bytes) -> None:
    seen: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    async def app(_scope: Any, receive: Any, _send: Any) -> None:
        seen.append(await receive())

    middleware = NullsAreDefaults(app, {"/x": frozenset({"a"})})
    asyncio.run(middleware({"type": "http", "path": "/x"}, receive, None))  # type: ignore[arg-type]
    assert seen[0]["body"] == body


GIVEN = {
    "picture": {"image_data": "data:"},
    "pictures of two prompts": {"text": ["a", "b"], "image_data": [[None], ["data:"]]},
    "video": {"video_data": ["data:"]},
    "sound": {"audio_data": "data:"},
}


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
def test_a_model_without_eyes_and_ears_says_so(
    app: Any, manager: TokenizerManager, given: dict[str, Any]
) -> None:
    status, answer = post(app, "/generate", {"text": "Hi"} | given)
    assert status == 400
    assert "text only" in answer["error"]["message"]
    assert not manager.asked


def chat_request(*parts: Any) -> Any:
    from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest

    content = [{"type": "text", "text": "What is it?"}, *parts]
    return ChatCompletionRequest(model="m", messages=[{"role": "user", "content": content}])


@pytest.mark.parametrize(
    ("kind", "what"),
    [("image_url", "pictures"), ("video_url", "videos"), ("audio_url", "sound")],
)
def test_messages_for_a_model_without_eyes_and_ears(kind: str, what: str) -> None:
    request = chat_request({"type": kind, kind: {"url": "data:"}})
    with pytest.raises(ValueError, match=f"text only, not {what}"):
        text_only_messages(None, request, False)
    text_only_messages(None, request, True)
    text_only_messages(None, chat_request(), False)


@pytest.mark.parametrize("multimodal", [False, True])
def test_messages_of_anthropic(multimodal: bool) -> None:
    manager = TokenizerManager(multimodal=multimodal)
    serving = SimpleNamespace(openai_serving_chat=SimpleNamespace(tokenizer_manager=manager))
    request = chat_request({"type": "image_url", "image_url": {"url": "data:"}})
    refused = nullcontext() if multimodal else pytest.raises(ValueError, match="text only")
    with refused:
        text_only_anthropic(request, serving, None)


@pytest.mark.parametrize("none", [None, [], [None, None]], ids=str)
def test_no_picture_is_no_picture(app: Any, manager: TokenizerManager, none: Any) -> None:
    assert post(app, "/generate", {"text": "Hi", "image_data": none})[0] == 200
    assert len(manager.asked) == 1


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/chat", {"model": "m", "messages": [MESSAGES[0] | {"images": ["AAAA"]}]}),
        ("/api/generate", {"model": "m", "prompt": "Hi", "images": ["AAAA"]}),
    ],
)
def test_routes_that_would_lose_a_picture_refuse_it(app: Any, path: str, body: Any) -> None:
    status, answer = post(app, path, body)
    assert status == 400
    assert "pictures" in answer["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
def test_ollama_routes(app: Any, manager: TokenizerManager, path: str, stream: bool) -> None:
    status, answer = post(app, path, MINIMAL[path] | {"stream": stream})
    assert status == 200
    lines = [json.loads(line) for line in answer.splitlines()] if stream else [answer]
    assert len(lines) == 1 + stream
    assert lines[-1]["done"]
    assert "so" in json.dumps(lines[0])
    (asked,) = manager.asked
    assert asked.input_ids == [1, 2] if path == "/api/chat" else asked.text == "Hi"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/api/chat", "/api/generate", "/generate"])
def test_what_is_wrong_with_a_request_is_a_400(
    app: Any, manager: TokenizerManager, path: str, stream: bool
) -> None:
    manager.refuses = "it is too long"
    status, answer = post(app, path, MINIMAL.get(path, {"text": "Hi"}) | {"stream": stream})
    if path == "/generate" and stream:
        assert "it is too long" in answer  # SGLang's own way: an event of the stream
    else:
        assert (status, answer["error"]["message"]) == (400, "it is too long")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/parse_function_call", {"text": "Hi", "tools": []}),
        ("/parse_function_call", {"text": "Hi", "tools": [], "tool_call_parser": "none"}),
        ("/separate_reasoning", {"text": "Hi", "reasoning_parser": "none"}),
    ],
)
def test_an_unknown_parser_is_a_400(app: Any, path: str, body: Any) -> None:
    status, answer = post(app, path, body)
    assert status == 400
    assert "nsupported" in answer["error"]["message"]


def test_the_longest_prompt_can_be_written_as_json(app: Any, manager: TokenizerManager) -> None:
    assert app
    assert manager.tokenizer.model_max_length == 8192


def test_a_model_with_eyes_gets_pictures() -> None:
    from fastapi import FastAPI

    with_eyes = TokenizerManager(multimodal=True)
    mend_answers(FastAPI(), with_eyes)
    with_eyes.generate_request(SimpleNamespace(image_data="data:")).aclose()  # type: ignore[attr-defined]
