"""Who gets records of a stream, who may give some, and what they are taken for."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from sglang.srt.managers.io_struct import GenerateReqInput
from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from kunserve_sglang.core.resumption import (
    COMMENT,
    JOURNAL_HEADER,
    NOT_RESUMABLE,
    RESUME_HEADER,
    Resumption,
)
from kunserve_sglang.sglang_seam.journal import CURRENT, OUTPUTS, OwnerJournal, Record
from kunserve_sglang.sglang_seam.journaled_streams import JournaledStreams
from kunserve_sglang.sglang_seam.resuming import JournaledGeneration

KEY = "the admin key"
BODY = {"input_ids": [1, 2], "stream": True, "sampling_params": {}}
TOKENS = (5, 6, 7)


class Manager:
    """As SGLang's tokenizer manager: hands out one token after the other."""

    def __init__(self, *, incremental: bool = False) -> None:
        self.server_args = SimpleNamespace(incremental_streaming_output=incremental)
        self.asked: list[Any] = []
        self.aborted: list[str] = []
        self.starts_with = "t"

    def abort_request(self, rid: str) -> None:
        self.aborted.append(rid)

    async def generate_request(self, obj: Any, _request: Any = None) -> AsyncIterator[Any]:
        obj.normalize_batch_and_arguments()
        self.asked.append(obj)
        given = (obj.sampling_params.get("custom_params") or {}).get(OUTPUTS, [])
        for end in range(len(given) + 1, len(TOKENS) + 1):
            meta = {"id": obj.rid, "prompt_tokens": 2, "completion_tokens": end}
            yield {
                "text": self.starts_with + "abc"[:end],
                "output_ids": list(TOKENS[:end]),
                "meta_info": {**meta, "finish_reason": {"type": "length"} if end == 3 else None},
            }


def server(manager: Manager) -> JournaledStreams:
    """An endpoint with a stream of deltas, as OpenAI's are, that name a time."""
    generate = JournaledGeneration(manager, manager.generate_request)

    async def deltas(obj: Any) -> AsyncIterator[bytes]:
        sent = 0
        try:
            async for output in generate(obj):
                text, sent = output["text"][sent:], len(output["text"])
                event = {"id": output["meta_info"]["id"], "created": 7, "delta": text}
                yield b"data: %b\n\n" % json.dumps(event).encode()
        except ValueError as error:
            yield b'data: {"error": "%b"}\n\n' % str(error).encode()
        yield b"data: [DONE]\n\n"

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        body = json.loads((await receive())["body"])
        if body.get("stream"):
            obj = GenerateReqInput(**body)
            answer: Any = StreamingResponse(deltas(obj), media_type="text/event-stream")
        else:
            answer = JSONResponse({"length": dict(scope["headers"])[b"content-length"].decode()})
        await answer(scope, receive, send)

    return JournaledStreams(serve, KEY)


class Answer:
    def __init__(self, messages: list[Message]) -> None:
        start, *rest = messages
        self.status = start["status"]
        self.journaled = JOURNAL_HEADER in dict(start["headers"])
        blocks = b"".join(m["body"] for m in rest).split(b"\n\n")[:-1]
        lines = [line for block in blocks for line in block.split(b"\n")]
        self.whole = b"".join(m["body"] for m in rest)
        self.records = [li.removeprefix(COMMENT) for li in lines if li.startswith(COMMENT)]
        self.events = [line for line in lines if not line.startswith(COMMENT)]


def ask(
    manager: Manager,
    body: Any = BODY,
    *headers: tuple[bytes, bytes],
    after: bytes = b"",
) -> Answer:
    whole = json.dumps(body).encode() + after
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": whole}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"spec_version": "2.4"},
        "path": "/v1/completions",
        "headers": [*headers, (b"content-length", b"%d" % len(whole))],
    }
    asyncio.run(server(manager)(scope, receive, send))
    return Answer(sent)


def journaled(manager: Manager, body: Any = BODY) -> Answer:
    return ask(manager, body, (JOURNAL_HEADER, KEY.encode()))


def resumed(manager: Manager, records: list[bytes], events: int, body: Any = BODY) -> Answer:
    order = Resumption(len(json.dumps(body)), events, 1234)
    return ask(
        manager,
        body,
        (JOURNAL_HEADER, KEY.encode()),
        (RESUME_HEADER, msgspec.json.encode(order)),
        after=b"".join(record + b"\n" for record in records),
    )


def test_records_come_before_their_events() -> None:
    answer = journaled(Manager())
    assert answer.journaled
    assert len(answer.records) == 3
    assert answer.whole.startswith(COMMENT)
    plain = ask(Manager())
    assert [_delta(e) for e in answer.events] == [_delta(e) for e in plain.events]


@pytest.mark.parametrize("key", [b"", b"another key"])
def test_only_who_has_the_key_gets_records_and_may_give_some(key: bytes) -> None:
    resumption = (RESUME_HEADER, msgspec.json.encode(Resumption(5, 2)))
    answer = ask(Manager(), BODY, (JOURNAL_HEADER, key), resumption)
    assert not answer.journaled
    assert not answer.records
    assert len(answer.events) == 4


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_stream_goes_on_after_any_event(count: int) -> None:
    first = journaled(Manager())
    manager = Manager()
    rest = resumed(manager, first.records[:count], count)
    assert [*map(_delta, first.events[:count]), *map(_delta, rest.events)] == [
        *map(_delta, first.events)
    ]
    # The scheduler makes nothing twice, and nothing at all if there is nothing left.
    assert len(rest.records) == max(0, 3 - count)
    assert len(manager.asked) == (count < 3)
    ids = {json.loads(e.removeprefix(b"data: "))["id"] for e in first.events[:1]}
    for event in rest.events[:-1]:
        said = json.loads(event.removeprefix(b"data: "))
        assert {said["id"]} == ids
        assert said["created"] == 1234


def test_one_that_was_resumed_can_be_resumed_again() -> None:
    first = journaled(Manager())
    second = resumed(Manager(), first.records[:1], 1)
    third = resumed(Manager(), [*first.records[:1], *second.records[:1]], 2)
    assert list(map(_delta, third.events)) == list(map(_delta, first.events[2:]))


class Ahead(Manager):
    """As SGLang's under load: the next token is there before anybody has looked at the last one.

    Outputs that are not the last share their lists.
    """

    async def generate_request(self, obj: Any, _request: Any = None) -> AsyncIterator[Any]:
        obj.normalize_batch_and_arguments()
        tokens = list(obj.sampling_params["custom_params"][OUTPUTS])
        logprobs: list[float] = []
        loop = asyncio.get_running_loop()
        for token in TOKENS[len(tokens) :]:
            tokens[:] = TOKENS[: TOKENS.index(token) + 1]
            logprobs[:] = [0.5] * len(tokens)
            meta = {"id": obj.rid, "finish_reason": None, "completion_tokens": len(tokens)}
            meta |= {"output_token_logprobs": logprobs}
            meta |= {"output_token_logprobs_length": len(tokens)}
            loop.call_soon(tokens.append, token + 1)
            loop.call_soon(logprobs.append, 0.5)
            yield {"text": "tabc"[: len(tokens) + 1], "output_ids": tokens, "meta_info": meta}


def test_what_comes_before_an_output_is_looked_at_is_no_part_of_it() -> None:
    """Else a client gets a token that no record has, and then the same again."""

    async def outputs() -> list[dict[str, Any]]:
        CURRENT.set(OwnerJournal([Record(0, [TOKENS[0]], "ta", prompt={"id": "r"})], replays=False))
        manager = Ahead()
        generate = JournaledGeneration(manager, manager.generate_request)
        obj = GenerateReqInput(**BODY, return_logprob=True)
        return [dict(output) async for output in generate(obj)]

    found = asyncio.run(outputs())
    assert [output["output_ids"] for output in found] == [[5, 6], [5, 6, 7]]
    assert [len(o["meta_info"]["output_token_logprobs"]) for o in found] == [2, 3]


def test_a_text_that_does_not_go_on_is_an_error() -> None:
    records = journaled(Manager()).records
    other = Manager()
    other.starts_with = "x"
    (event, end) = resumed(other, records[:1], 1).events
    assert b"read differently" in event
    assert end == b"data: [DONE]"


def test_events_that_cannot_have_been_are_an_error() -> None:
    records = journaled(Manager()).records
    (event, _) = resumed(Manager(), records[:1], 2).events
    assert b"another part of it was delivered" in event


def test_records_that_are_none_are_refused() -> None:
    assert resumed(Manager(), [b"[1,"], 1).status == 400


@pytest.mark.parametrize(
    "body",
    [
        {"session_params": {"id": "s"}},
        {"return_hidden_states": True},
        {"image_data": ["a picture"]},
        {"return_routed_experts": True},
    ],
)
def test_streams_that_cannot_be_resumed_say_so(body: dict[str, Any]) -> None:
    answer = journaled(Manager(), {**BODY, **body})
    assert set(answer.records) == {NOT_RESUMABLE}
    assert len(answer.events) == 4


def test_streams_of_parts_cannot_be_resumed() -> None:
    assert set(journaled(Manager(incremental=True)).records) == {NOT_RESUMABLE}


def test_no_client_can_say_what_a_request_has_made() -> None:
    manager = Manager()
    params = {"custom_params": {OUTPUTS: [5, 6], "mine": 1}}
    answer = ask(manager, {**BODY, "sampling_params": params})
    assert len(answer.events) == 4
    assert manager.asked[0].sampling_params["custom_params"] == {"mine": 1}


def test_a_client_that_leaves_a_resumed_stream_leaves_nothing_behind() -> None:
    """Each of its choices is a request of its own, which SGLang knows nothing of."""
    body = {**BODY, "sampling_params": {"n": 3}}
    manager = Manager()

    async def begin_and_leave() -> None:
        CURRENT.set(OwnerJournal([Record(index=1, tokens=[5], text="ta", prompt={"id": "b"})]))
        outputs = JournaledGeneration(manager, manager.generate_request)(GenerateReqInput(**body))
        assert isinstance(outputs, AsyncGenerator)
        assert (await anext(outputs))["index"] == 1
        assert (await anext(outputs))["index"] in (0, 1, 2)
        await outputs.aclose()

    asyncio.run(begin_and_leave())
    rids = {part.rid for part in manager.asked}
    assert len(rids) == 3
    assert "b" in rids
    assert set(manager.aborted) == rids


def test_other_answers_are_as_they_are() -> None:
    answer = journaled(Manager(), {"stream": False})
    assert not answer.journaled
    assert json.loads(answer.whole) == {"length": str(len(json.dumps({"stream": False})))}


def _delta(event: bytes) -> Any:
    data = event.removeprefix(b"data: ")
    return data if data == b"[DONE]" else json.loads(data).get("delta", data)
